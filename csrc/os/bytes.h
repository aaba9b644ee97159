/* The bytes of an open file: read, written, sent to disk, and the blocks that they occupy there. */
#ifndef NDM_BYTES_H
#define NDM_BYTES_H

#include "os/file.h"

/* Writing or sizing a file past RLIMIT_FSIZE would raise SIGXFSZ besides failing. */
bool ndm_i_file_is_over_limit(uint64_t end);

/* pwrite all of it, cut at grains. `data` NULL: zeros. 0 or errno: EFBIG, before anything is written, if it would reach
 * past RLIMIT_FSIZE. */
int ndm_i_file_write(const ndm_i_file *file, const uint8_t *data, uint64_t size, uint64_t offset);

/* pread all of it; a file that ends before is EIO. */
int ndm_i_file_load(const ndm_i_file *file, uint64_t offset, void *buffer, uint64_t size);

/* pread, up to the file's end: how many bytes came. Negative, and no more than that, where the system cannot read them. */
int64_t ndm_i_file_load_some(const ndm_i_file *file, uint64_t offset, void *buffer, uint64_t size);

/* Get blocks for [start, end); what is there stays. Does nothing where the file system knows no fallocate(): writing
 * gets them there. 0 or errno. */
int ndm_i_file_allocate(ndm_i_file *file, uint64_t start, uint64_t end);

/* The same for [start, end) beyond the file's end, which stays where it is. What is not used goes with the next
 * ndm_i_file_shrink(). */
int ndm_i_file_allocate_beyond(const ndm_i_file *file, uint64_t start, uint64_t end);

/* Get blocks for all of the file, whatever the file system knows; its bytes stay. 0 or errno. */
int ndm_i_file_get_blocks(ndm_i_file *file);

/* Does the file system punch holes? Asks it, past the end of the file. */
bool ndm_i_file_can_punch(ndm_i_file *file);

/* Give the blocks of [start, end) back. false: the file system would not (can_punch tells if it never will). */
bool ndm_i_file_punch(ndm_i_file *file, uint64_t start, uint64_t end);

/* Start writing dirty pages of [start, end) to disk, and wait for them if `wait`. 0 or errno. Any thread. */
int ndm_i_file_write_back(const ndm_i_file *file, uint64_t start, uint64_t end, bool wait);

/* Have the data on disk, and the file system's own notes of where it is. 0 or errno. */
int ndm_i_file_sync(const ndm_i_file *file);

/* Drop the clean pages of [start, end) from RAM. Any thread that holds the mapping. */
void ndm_i_file_drop(const ndm_i_file *file, const ndm_i_mapping *mapping, uint64_t start, uint64_t end);

/* Bytes that the file system has left for this user; UINT64_MAX: unknown. */
uint64_t ndm_i_file_disk_free(const ndm_i_file *file);

/* Bytes of disk that the file occupies. */
int ndm_i_file_disk_bytes(const ndm_i_file *file, uint64_t *bytes);

#endif
