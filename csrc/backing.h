/* The file and its mapping. The only place with open, flock, ftruncate, fallocate, mmap, mremap, madvise, pwrite.
 *
 * The promise: a page is touched through the mapping only after the file system has given it a block, so that a
 * full disk is a status and never SIGBUS. Each page of the file is in one of two states:
 *
 *   NDM_I_EMPTY  never touched: it may have no block, and holds no byte of any value.
 *   NDM_I_READY  it has a block and has been in the page cache: memcpy is safe and fast.
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
    uint8_t *pages;         /* a state for each page of the capacity */
    uint64_t capacity;      /* the file's size */
    uint64_t allocated;     /* fallocate() has been asked for the bytes below; a hint, not a promise */
    uint64_t inode;         /* which file this is: number and time of birth (0 where unknown) */
    uint64_t born;
    int fd;
    bool in_memory;         /* tmpfs: preparing means fallocate and populate */
    bool can_allocate;      /* the file system knows fallocate() */
    bool created;           /* by this open, not found */
} ndm_i_backing;

/* Open `path` (not through a symlink, regular files only), create it (0600) if it is missing and `create` is set, and
 * lock it if `lock` is set. The file's size becomes the capacity. Nothing is mapped or changed yet. */
int ndm_i_backing_open(ndm_i_backing *backing, const char *path, bool create, bool lock);

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

/* Undo a grow: cut the file back to `capacity`. */
void ndm_i_backing_shrink(ndm_i_backing *backing, uint64_t capacity);

/* Make [offset, offset + size) safe to touch through the mapping. */
int ndm_i_backing_prepare(ndm_i_backing *backing, uint64_t offset, uint64_t size);

/* Copy `size` bytes to `offset`, by the way that suits the size and the state of the pages. */
int ndm_i_backing_store(ndm_i_backing *backing, uint64_t offset, const void *data, uint64_t size);

/* Let go of the mapping; views keep it. */
void ndm_i_backing_unmap(ndm_i_backing *backing);

/* Unlock and close the file; frees the rest. Unlinks `path` if it is given. */
void ndm_i_backing_close(ndm_i_backing *backing, const char *unlink_path);

void ndm_i_mapping_ref(ndm_i_mapping *mapping);
void ndm_i_mapping_unref(ndm_i_mapping *mapping); /* any thread; the last one unmaps */

#endif
