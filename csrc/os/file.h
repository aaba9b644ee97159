/* An open file: how it is opened, its size, its mapping, its end. Only this file, bytes.h and locks.h make system calls on the
 * files that a region is made of: open, stat, ftruncate here; fallocate, pread, pwrite, sync_file_range, fadvise on bytes;
 * flock and fcntl for locks. They know nothing of what the bytes mean.
 *
 * Address space for the ceiling is mapped at the start (mapping past the end of a file is legal), so the base stays while
 * the file grows. Beyond that reservation the mapping is extended (mapping.h).
 */
#ifndef NDM_FILE_H
#define NDM_FILE_H

#include "os/mapping.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct {
    ndm_i_mapping *mapping;
    uint64_t capacity;   /* the file's size */
    uint64_t inode;      /* which file this is: number and time of birth (0 where unknown) */
    uint64_t born;
    uint64_t modified;   /* time of the last change when it was examined, in nanoseconds */
    uint32_t user;       /* whose file it is */
    uint64_t process;    /* that opened it: its locks are that process's */
    int fd;
    bool in_memory;      /* tmpfs or ramfs */
    bool large_folios;   /* the page cache holds the file in pieces larger than a page */
    bool keeps_blocks;   /* a block once given stays good for stores through the mapping (not so on btrfs and its kin) */
    bool can_allocate;   /* the file system knows fallocate() */
    bool can_punch;      /* and holes */
    bool holes_need_room; /* to look at a hole takes a page of the file system: on a full one that is SIGBUS */
    bool created;        /* by this open, not found */
    bool linked;         /* it had a name when it was examined */
} ndm_i_file;

/* Functions that return int give a status with the error set, unless they say "0 or errno". What opens, maps, unmaps or
 * closes bars forks meanwhile (fork.h). */

/* Open `path` (not through a symlink; regular files of our own user only), create it (0600, whatever the umask) if it is
 * missing and `create` is set, and lock it. The file's size becomes the capacity. Nothing is mapped or changed yet. */
int ndm_i_file_open(ndm_i_file *file, const char *path, bool create, int lock);

/* How a file is locked: as a whole (flock), or by its first byte (a lock of the open file, F_OFD_SETLK), which leaves
 * flock to say who reads. */
enum { NDM_I_LOCK_FILE, NDM_I_LOCK_BYTE, NDM_I_LOCK_NONE };

/* Is it a file of the user that this process runs as now? Has it still a name? */
bool ndm_i_file_is_own(const ndm_i_file *file);
bool ndm_i_file_is_linked(const ndm_i_file *file);

/* Exchange the open file for another of the same file, with locks of its own: a forked child's copy shares its parent's.
 * false with errno: the file is closed, no more. */
bool ndm_i_file_reopen(ndm_i_file *file);

/* The file's size now; 0 if it cannot be told. */
uint64_t ndm_i_file_size(const ndm_i_file *file);

/* A reader's: open `path` for reading only, or to write, too. Through symlinks, as those of /proc/<pid>/fd. The caller
 * has no lock. */
int ndm_i_file_open_to_read(ndm_i_file *file, const char *path);
int ndm_i_file_open_to_lease(ndm_i_file *file, const char *path);

/* An unnamed file in `directory`, or in memory if it is NULL. */
int ndm_i_file_open_unnamed(ndm_i_file *file, const char *directory);

/* 1 if the file has a byte that is not part of a hole, 0 if not. */
int ndm_i_file_has_data(const ndm_i_file *file);

/* The file, still empty, will be stored to through its mapping: ask a file system that copies on write to overwrite its
 * blocks in place. On btrfs a store then needs no new block (seen on Linux 6.18; older kernels may want one). */
void ndm_i_file_overwrite_in_place(const ndm_i_file *file);

/* Give the file at least `capacity` bytes and map it with room for `ceiling`. What is there stays as it is. A status means
 * that the file is as it was. */
int ndm_i_file_start(ndm_i_file *file, uint64_t capacity, uint64_t ceiling);

/* Make all of a file that was started holes. Nobody else may have it mapped. */
int ndm_i_file_empty(const ndm_i_file *file);

/* Extend the file to `wanted` bytes or, if the system refuses that, by half or a quarter of what that has to spare, or to
 * `needed`. The mapping is replaced only
 * when its address space ends below; the new one has room for `ceiling` if it can be had. */
int ndm_i_file_grow(ndm_i_file *file, uint64_t needed, uint64_t wanted, uint64_t ceiling);

/* Cut the file back to `capacity`: undo a grow, or give space back. */
void ndm_i_file_shrink(ndm_i_file *file, uint64_t capacity);

/* May the file be written up to `end`? EIO if somebody else has shortened it: past its end, touching the mapping
 * would be SIGBUS. EFBIG beyond RLIMIT_FSIZE, where writing would raise SIGXFSZ. */
int ndm_i_file_check_writable(const ndm_i_file *file, uint64_t end);

/* Let go of the mapping; views keep it. */
void ndm_i_file_unmap(ndm_i_file *file);

/* Unlock and close the file. Unlinks `path` if it is given. In a forked child the copies are closed, no more: what the
 * parent has locked stays locked. */
void ndm_i_file_close(ndm_i_file *file, const char *unlink_path);

/* Close the descriptor only: the mapping and what is locked stay. */
void ndm_i_file_abandon(ndm_i_file *file);

#endif
