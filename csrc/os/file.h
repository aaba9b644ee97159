/* The file (backing.c) and its mappings (mapping.c). The only place with system calls on them: open, flock, ftruncate, fallocate, mmap, mremap,
 * madvise, pwrite, pread, sync_file_range and their kin.
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

#define NDM_I_GRAIN ((uint64_t)512 << 10) /* every write is cut at multiples of it: see grains.h */

/* One mapping of the file. Its base never changes while more than its backing holds it. */
typedef struct {
    uint8_t *base;
    uint64_t length;        /* bytes of address space */
    _Atomic uint64_t users; /* the backing, each view, and the background writer while it looks */
} ndm_i_mapping;

typedef struct {
    ndm_i_mapping *mapping;
    uint64_t capacity;   /* the file's size */
    uint64_t inode;      /* which file this is: number and time of birth (0 where unknown) */
    uint64_t born;
    int fd;
    bool in_memory;      /* tmpfs */
    bool large_folios;   /* the page cache holds the file in pieces larger than a page */
    bool keeps_blocks;   /* a block once given stays good for stores through the mapping (not so on btrfs and its kin) */
    bool can_allocate;   /* the file system knows fallocate() */
    bool can_punch;      /* and holes */
    bool created;        /* by this open, not found */
    bool own;            /* its owner is this process's user */
    bool linked;         /* it had a name when it was examined */
} ndm_i_backing;

/* Functions that return int give a status with the error set, unless they say "0 or errno". */

/* Open `path` (not through a symlink; regular files of our own user only), create it (0600) if it is missing and `create` is set, and
 * lock it. The file's size becomes the capacity. Nothing is mapped or changed yet. */
int ndm_i_backing_open(ndm_i_backing *backing, const char *path, bool create, int lock);

/* How a file is locked: as a whole (flock), or by its first byte (a lock of the open file, F_OFD_SETLK), which leaves
 * flock to say who reads. */
enum { NDM_I_LOCK_FILE, NDM_I_LOCK_BYTE, NDM_I_LOCK_NONE };

/* Lock, or unlock, one byte for this open file. false: another has it. */
bool ndm_i_backing_lock_byte(const ndm_i_backing *backing, uint64_t byte, bool lock);

/* Has another open file that byte? */
bool ndm_i_backing_is_byte_locked(const ndm_i_backing *backing, uint64_t byte);

/* The file's size now; 0 if it cannot be told. */
uint64_t ndm_i_backing_size(const ndm_i_backing *backing);

/* A reader's: open `path` for reading only, or to write, too. Through symlinks, as those of /proc/<pid>/fd. The caller
 * has no lock. */
int ndm_i_backing_open_to_read(ndm_i_backing *backing, const char *path);
int ndm_i_backing_open_to_lease(ndm_i_backing *backing, const char *path);

/* `whole`: lock the file against readers, false if there are some. Otherwise let them in again. */
bool ndm_i_backing_flock(const ndm_i_backing *backing, bool whole);

/* Say that a reader is there, until the file is closed. Waits while the owner bars readers. */
int ndm_i_backing_flock_to_read(const ndm_i_backing *backing);

/* Map `length` bytes for reading only; those past the end may become part of the file later. NULL with the error set. */
ndm_i_mapping *ndm_i_backing_map_to_read(const ndm_i_backing *backing, uint64_t length);

/* An unnamed file in `directory`, or in memory if it is NULL. */
int ndm_i_backing_open_unnamed(ndm_i_backing *backing, const char *directory);

/* 1 if the file has a byte that is not part of a hole, 0 if not. */
int ndm_i_backing_has_data(const ndm_i_backing *backing);

/* The file, still empty, will be stored to through its mapping: ask a file system that copies on write to overwrite its
 * blocks in place. On btrfs a store then needs no new block (seen on Linux 6.18; older kernels may want one). */
void ndm_i_backing_overwrite_in_place(const ndm_i_backing *backing);

/* Give the file `capacity` bytes and map it with room for `ceiling`. `keep` what is there, or make it all holes. */
int ndm_i_backing_start(ndm_i_backing *backing, uint64_t capacity, uint64_t ceiling, bool keep);

/* Extend the file to `wanted` bytes or, if the system refuses that, to `needed`. The mapping is replaced only
 * when its address space ends below; the new one has room for `ceiling` if it can be had. */
int ndm_i_backing_grow(ndm_i_backing *backing, uint64_t needed, uint64_t wanted, uint64_t ceiling);

/* Cut the file back to `capacity`: undo a grow, or give space back. */
void ndm_i_backing_shrink(ndm_i_backing *backing, uint64_t capacity);

/* May the file be written up to `end`? EIO if somebody else has shortened it: past its end, touching the mapping
 * would be SIGBUS. EFBIG beyond RLIMIT_FSIZE, where writing would raise SIGXFSZ. */
int ndm_i_backing_check_writable(const ndm_i_backing *backing, uint64_t end);

/* pwrite all of it, cut at grains. `data` NULL: zeros. 0 or errno: EFBIG, before anything is written, if it would reach
 * past RLIMIT_FSIZE. */
int ndm_i_backing_write(const ndm_i_backing *backing, const uint8_t *data, uint64_t size, uint64_t offset);

/* pread all of it; a file that ends before is EIO. */
int ndm_i_backing_load(const ndm_i_backing *backing, uint64_t offset, void *buffer, uint64_t size);

/* Get blocks for [start, end); what is there stays. Does nothing where the file system knows no fallocate(): writing
 * gets them there. 0 or errno. */
int ndm_i_backing_allocate(ndm_i_backing *backing, uint64_t start, uint64_t end);

/* Map the pages of [start, end) for writing, all at once. */
void ndm_i_backing_populate(const ndm_i_backing *backing, uint64_t start, uint64_t end);

/* Give the blocks of [start, end) back. false: the file system would not (can_punch tells if it never will). */
bool ndm_i_backing_punch(ndm_i_backing *backing, uint64_t start, uint64_t end);

/* Start writing dirty pages of [start, end) to disk, and wait for them if `wait`. 0 or errno. Any thread. */
int ndm_i_backing_write_back(const ndm_i_backing *backing, uint64_t start, uint64_t end, bool wait);

/* Have the data on disk, and the file system's own notes of where it is. 0 or errno. */
int ndm_i_backing_sync(const ndm_i_backing *backing);

/* Drop the clean pages of [start, end) from RAM. Any thread that holds the mapping. */
void ndm_i_backing_drop(const ndm_i_backing *backing, const ndm_i_mapping *mapping, uint64_t start, uint64_t end);

/* Is all of [start, end) in the page cache? false also where the kernel cannot tell cheaply (before Linux 6.5). */
bool ndm_i_backing_is_cached(const ndm_i_backing *backing, uint64_t start, uint64_t end);

/* Which pages of [start, start + length) are in RAM: bit 0 of each byte. A reader's file is mapped for the purpose. false
 * with errno. */
bool ndm_i_backing_in_core(const ndm_i_backing *backing, uint64_t start, uint64_t length, unsigned char *in_core);

/* Bytes of the file in RAM (UINT64_MAX: the kernel does not tell this user), and of these not yet on disk (0 where it
 * cannot tell). Linear in the pages. */
int ndm_i_backing_residency(const ndm_i_backing *backing, uint64_t *resident, uint64_t *unwritten);

/* Bytes of disk that the file occupies. */
int ndm_i_backing_disk_bytes(const ndm_i_backing *backing, uint64_t *bytes);

/* A private, copy-on-write mapping of [offset, offset + size); *address is where `offset` is. NULL with the error set. */
ndm_i_mapping *ndm_i_backing_map_private(const ndm_i_backing *backing, uint64_t offset, uint64_t size, char **address);

/* Let go of the mapping; views keep it. */
void ndm_i_backing_unmap(ndm_i_backing *backing);

/* Unlock and close the file. Unlinks `path` if it is given. */
void ndm_i_backing_close(ndm_i_backing *backing, const char *unlink_path);

/* ---- mapping.c ---- */

/* Map the file, with `length` bytes of address space. */
int ndm_i_map_fresh(ndm_i_backing *backing, uint64_t length);

/* Give the current mapping `length` bytes of address space: move it when only we look through it, otherwise duplicate
 * it (mremap of 0 bytes) and leave the old one to its views. */
int ndm_i_remap(ndm_i_backing *backing, uint64_t length);

void ndm_i_mapping_ref(ndm_i_mapping *mapping);
void ndm_i_mapping_unref(ndm_i_mapping *mapping); /* any thread; the last one unmaps */

/* The whole pages in the range leave this process's RSS; their contents stay in the page cache. Any thread. */
void ndm_i_mapping_forget(void *address, uint64_t size);

/* Read the range from disk in one go, if it is not in RAM. */
void ndm_i_mapping_fetch(void *address, uint64_t size);

#endif
