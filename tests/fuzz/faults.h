/* Forced into the C core when it is built for fuzzing: its system calls go through disk.c, which plays a small disk
 * and fails where the input says so. */
#ifndef NDM_FUZZ_FAULTS_H
#define NDM_FUZZ_FAULTS_H

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

ssize_t disk_pwrite(int fd, const void *data, size_t size, off_t offset);
ssize_t disk_pwritev(int fd, const struct iovec *parts, int count, off_t offset);
int disk_fallocate(int fd, int mode, off_t offset, off_t size);
int disk_ftruncate(int fd, off_t size);
int disk_fstat(int fd, struct stat *facts);
int disk_fstatfs(int fd, struct statfs *facts);
int disk_close(int fd);
void *disk_mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset);
void *disk_mremap(void *old, size_t old_length, size_t length, int flags, void *address);
int disk_munmap(void *address, size_t length);
int disk_madvise(void *address, size_t length, int advice);
void *disk_memcpy(void *to, const void *from, size_t size);
void *disk_memmove(void *to, const void *from, size_t size);
void *disk_memset(void *to, int value, size_t size);
void *disk_malloc(size_t size);
void *disk_calloc(size_t count, size_t size);
void *disk_realloc(void *old, size_t size);

#ifndef NDM_FUZZ_DISK
#define pwrite disk_pwrite
#define pwritev disk_pwritev
#define fallocate disk_fallocate
#define ftruncate disk_ftruncate
#define fstat disk_fstat
#define fstatfs disk_fstatfs
#define close disk_close
#define mmap disk_mmap
#define mremap disk_mremap
#define munmap disk_munmap
#define madvise disk_madvise
#define memcpy disk_memcpy
#define memmove disk_memmove
#define memset disk_memset
#define malloc disk_malloc
#define calloc disk_calloc
#define realloc disk_realloc
#endif

#endif
