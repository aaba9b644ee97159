/* The file and its mapping. The only place with open, flock, ftruncate, fallocate, mmap, mremap, madvise, pwrite.
 *
 * The promise: a byte is stored through the mapping only after the file system has given its whole neighbourhood
 * blocks, so that a full disk is a status and never SIGBUS. A store into a clean page makes the file system find
 * blocks for the whole folio that holds the page, and folios may be large. So every write is cut at grains, aligned
 * pieces of 512 KiB, which keeps each folio inside one grain, and memcpy is for grains that have all their blocks:
 *
 *   NDM_I_EMPTY    never touched, or given back: no value has a byte in it.
 *   NDM_I_PARTIAL  it holds values, but may lack blocks elsewhere: pwrite only, until it gets them.
 *   NDM_I_READY    it has all its blocks.
 *
 * Address space for the ceiling is mapped at the start (mapping past the end of a file is legal), so the base
 * stays while the file grows. Beyond that reservation the mapping is moved when nobody looks through it, and
 * doubled when somebody does.
 */
#ifndef NDM_BACKING_H
#define NDM_BACKING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* One mapping of the file. Its base never changes while more than its backing holds it. */
typedef struct {
    uint8_t *base;
    uint64_t length;        /* bytes of address space */
    _Atomic uint64_t users; /* the backing, and each view */
} ndm_i_mapping;

typedef struct {
    ndm_i_mapping *mapping;
    uint8_t *grains;        /* a state for each grain of the capacity */
    uint64_t capacity;      /* the file's size */
    uint64_t allocated;     /* fallocate() has been asked for the bytes below; a hint, not a promise */
    uint64_t inode;         /* which file this is: number and time of birth (0 where unknown) */
    uint64_t born;
    int fd;
    bool in_memory;         /* tmpfs */
    bool can_allocate;      /* the file system knows fallocate() */
    bool can_punch;         /* and holes */
    bool created;           /* by this open, not found */
} ndm_i_backing;

/* Open `path` (not through a symlink, regular files only), create it (0600) if it is missing and `create` is set, and
 * lock it. The file's size becomes the capacity. Nothing is mapped or changed yet. */
int ndm_i_backing_open(ndm_i_backing *backing, const char *path, bool create);

/* An unnamed file in `directory`, or in memory if it is NULL. */
int ndm_i_backing_open_unnamed(ndm_i_backing *backing, const char *directory);

/* 1 if the file has a byte that is not part of a hole, 0 if not. */
int ndm_i_backing_has_data(const ndm_i_backing *backing);

/* Read `size` bytes at `offset` from the unmapped file; fewer in the file is EIO. */
int ndm_i_backing_load(const ndm_i_backing *backing, uint64_t offset, void *buffer, uint64_t size);

/* Give the file `capacity` bytes, all of them holes, and map it with room for `ceiling`. */
int ndm_i_backing_start(ndm_i_backing *backing, uint64_t capacity, uint64_t ceiling);

/* Extend the file to `wanted` bytes or, if the system refuses that, to `needed`. The mapping is replaced only
 * when its address space ends below; the new one has room for `ceiling` if it can be had. */
int ndm_i_backing_grow(ndm_i_backing *backing, uint64_t needed, uint64_t wanted, uint64_t ceiling);

/* Cut the file back to `capacity`: undo a grow, or give space back. */
void ndm_i_backing_shrink(ndm_i_backing *backing, uint64_t capacity);

/* Make [offset, offset + size) safe to store to through the mapping. */
int ndm_i_backing_prepare(ndm_i_backing *backing, uint64_t offset, uint64_t size);

/* Copy `size` bytes to `offset`, by the way that suits the size and the state of the pages. */
int ndm_i_backing_store(ndm_i_backing *backing, uint64_t offset, const void *data, uint64_t size);

/* Copy `size` bytes from one place of the file to a lower one; they may overlap. */
int ndm_i_backing_move(ndm_i_backing *backing, uint64_t from, uint64_t to, uint64_t size);

/* Give back the blocks of the whole pages in [offset, offset + size): they are empty again. Does nothing where the
 * file system cannot (can_punch tells). */
void ndm_i_backing_punch(ndm_i_backing *backing, uint64_t offset, uint64_t size);

/* Bytes of disk that the file occupies. */
int ndm_i_backing_disk_bytes(const ndm_i_backing *backing, uint64_t *bytes);

/* Let go of the mapping; views keep it. */
void ndm_i_backing_unmap(ndm_i_backing *backing);

/* Unlock and close the file; frees the rest. Unlinks `path` if it is given. */
void ndm_i_backing_close(ndm_i_backing *backing, const char *unlink_path);

void ndm_i_mapping_ref(ndm_i_mapping *mapping);
void ndm_i_mapping_unref(ndm_i_mapping *mapping); /* any thread; the last one unmaps */

#endif
