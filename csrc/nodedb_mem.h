/* nodedb_mem: overflow regions for data engines, and a governor of their memory. The public C API and its manual.
 *
 * A region is one memory-mapped file, owned by one thread, or by all threads of one process. An engine spills cold values into it and reads them back
 * without a copy. A value lives in a slot, named by a small integer.
 *
 *     ndm_options options = {.initial_capacity = 64 << 20, .max_capacity = 1 << 30, .alignment = 64,
 *                            .cache_limit = 256 << 20};
 *     ndm_region *region = ndm_region_open("/var/tmp/app.spill", &options);
 *     int64_t slot = ndm_region_write(region, data, size, 0);      // copied once; negative: an ndm_status
 *     uint64_t length;
 *     const char *view = ndm_region_read(region, slot, &length);   // no copy; pins the slot
 *     ndm_view_release(view);
 *     ndm_region_free(region, slot);
 *     ndm_region_destroy(region);
 *
 * Caveats, first:
 *
 *  - One owner. Only the thread that opened the region may call a ndm_region_* function, in the process that opened it.
 *    Elsewhere the function returns NDM_ERR_WRONG_THREAD and changes nothing. A forked child is not the owner. Any
 *    thread may call ndm_view_release(), ndm_view_try_release(), ndm_region_unpin(), ndm_region_destroy(), and
 *    ndm_region_adopt(), by which it becomes the owner of a region that has none.
 *  - Or many threads. A region that was opened with NDM_OWNED_BY_PROCESS may be called from every thread of the process that
 *    opened it. One lock of the region lets one function in at a time. A function gives the lock back while it copies a value
 *    out, while it writes a value of 64 KiB or more, and while it waits for the disk: to fetch values that are read,
 *    to write back what ndm_region_evict() and ndm_region_flush() name, or to get room under the cache limit. The lock is
 *    held while a small value is copied in, while the file grows, and by ndm_region_trim() and ndm_region_compact() until
 *    they return: give the latter a budget. ndm_region_try_read() never waits for the lock. A forked child is refused as ever.
 *    What the threads mean by a slot's number is their affair: one that another thread frees may be given out again at once.
 *    A signal handler must not call a function of a region that its own thread may be in the midst of.
 *  - A view (ndm_region_read) pins its slot. The bytes stay where they are, unchanged, until every view of them is
 *    released, even after the slot is freed or the region is closed. A view that is never released leaks its extent and
 *    keeps the mapping, and so the file's lock, until the process ends.
 *  - A forked child lets go of the region before fork() returns there: its copies of the descriptors, and so of the locks,
 *    are closed, and what no view uses is unmapped, whatever other threads do meanwhile: fork() waits until none of them is
 *    in the midst of opening, mapping, unmapping or closing. (A raw clone() runs no fork handlers; there, destroying does
 *    it.) A signal handler must not fork while it interrupts a function of this library.
 *    The views taken before the fork stay readable in the child, but nothing pins them for the child. Once the
 *    parent has freed and released a slot, the child sees what the parent writes there next. Touching the view is SIGBUS
 *    once the parent has trimmed the file to less. A store of the child's through a view of ndm_region_allocate() would
 *    then hit another value.
 *  - If another program shortens the file, touching a lost page is SIGBUS. Growing and preparing space notice a short
 *    file and return NDM_ERR_IO with EIO. Reading cannot notice it.
 *  - No thread may be cancelled (pthread_cancel) inside a function of this library: the region's books would be half-written.
 *  - Link with -pthread. Linux only.
 *
 * Errors: a function that returns an integer returns a negative ndm_status on failure, one that returns a pointer
 * returns NULL. ndm_last_error() then gives the details, for the calling thread. A function that fails has changed
 * nothing, and has not written to its output parameters. There are exceptions. ndm_region_read_many() and
 * ndm_region_load_many() may have written to their arrays and the buffer: what is there then is of no use. ndm_region_close()
 * closes the region and reports that a write-back had failed. ndm_region_compact() and ndm_region_trim() may stop half-way:
 * every value is intact, what was done so far stays, and the figures for readers are those of the space as it is. A write
 * that the disk refuses may have moved other values to make room.
 *
 * Sizes, offsets and capacities are bytes, always.
 *
 * Sections: errors and versions; opening and closing; one value; many values; what a region shows of itself; space and
 * RAM; sharing; readers; pins; handles. The governor is in nodedb_mem_governor.h, which this header includes.
 */
#ifndef NODEDB_MEM_H
#define NODEDB_MEM_H

#include <stddef.h>
#include <stdint.h>

/* What this header describes. ndm_version() and ndm_abi_version() give the same of the library that runs. The ABI version
 * is the number in the library's SONAME. It grows with each change that breaks a program compiled before the change. */
#define NDM_VERSION "0.1.0"
#define NDM_VERSION_NUMBER 100 /* major * 10000 + minor * 100 + patch */
#define NDM_ABI_VERSION 1

#define NDM_BYTES_UNKNOWN UINT64_MAX /* ndm_reader_figures.resident_bytes, ndm_error.disk_free */

/* To be called once, early: NDM_OK if the library that runs is one that this header describes. */
#define NDM_CHECK_ABI() ndm_check_abi(NDM_ABI_VERSION, NDM_VERSION_NUMBER)

#ifdef __cplusplus
extern "C" {
#endif
#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

/* [cdef: the Python binding is generated from the lines up to the closing mark] */

typedef struct ndm_region ndm_region;

enum ndm_status {
    NDM_OK = 0,
    NDM_ERR_ARGUMENT = -1,     /* a size, capacity, alignment or engine outside its range */
    NDM_ERR_NO_SLOT = -2,      /* the slot never existed */
    NDM_ERR_FREED_SLOT = -3,   /* the slot existed and has been freed */
    NDM_ERR_CAPACITY = -4,     /* more than max_capacity: ndm_error.required and .limit */
    NDM_ERR_WRONG_THREAD = -5, /* not the owning thread, or not of the owning process */
    NDM_ERR_CLOSED = -6,       /* the region is closed, or the pointer is NULL */
    NDM_ERR_BUSY = -7,         /* the file is locked by another region */
    NDM_ERR_IO = -8,           /* the system refused: ndm_error.os_errno */
    NDM_ERR_MEMORY = -9,       /* malloc failed */
    NDM_ERR_STALE = -10,       /* reader: the value is gone, or another has its slot, or the region was opened anew */
    NDM_ERR_UNCOMMITTED = -11, /* reader: the slot is allocated, and not committed yet */
    NDM_ERR_WAIT = -12,        /* ..._try_...(): not at once; nothing was done. Readers: not yet, call again */
    NDM_ERR_BUDGET = -13,      /* governor: more than the engine's limit: ndm_error.required, .limit, .allocated, .waiting */
    NDM_ERR_CEILING = -14,     /* governor: more than the ceiling, or what the headroom leaves of it; fields as above */
    NDM_ERR_ENGINE = -15,      /* governor: the engine is not known: ndm_error.engine */
    NDM_ERR_VERSION = -20      /* ndm_check_abi(): the library is not the one that the caller was compiled for */
};

enum ndm_ownership { NDM_OWNED_BY_THREAD = 0, NDM_OWNED_BY_PROCESS = 1 };

enum ndm_file { NDM_FILE_DATA = 0, NDM_FILE_SLOTS = 1, NDM_FILE_LEASES = 2 };

typedef struct {
    int32_t status;      /* an ndm_status */
    int32_t os_errno;    /* NDM_ERR_IO: errno; else 0 */
    uint64_t required;   /* NDM_ERR_CAPACITY: bytes of capacity the request needs; else 0 */
    uint64_t limit;      /* NDM_ERR_CAPACITY: the ceiling in force; else 0 */
    int64_t slot;        /* NDM_ERR_NO_SLOT, NDM_ERR_FREED_SLOT, NDM_ERR_UNCOMMITTED: which, if slot_known; else 0. Of
                            batches of readers NDM_ERR_STALE, too */
    const char *message; /* what was wrong or what was tried, a static string */
    int32_t file;        /* NDM_ERR_IO and NDM_ERR_BUSY: which of the region's files, an ndm_file */
    int32_t slot_known;  /* 1: batch verbs, ndm_h_* and readers; 0: the call named just one, and `slot` is 0 */
    int32_t space_known; /* 1: a verb found no room, and the fields below are the region's, as ndm_stats has them; else 0 */
    int32_t views;       /* live views, of any number up to INT32_MAX, of the bytes in pinned_bytes; leases keep the others */
    uint64_t free_bytes, largest_free_bytes, pinned_bytes;
    uint64_t disk_free;  /* bytes that the file system has left for this user; NDM_BYTES_UNKNOWN */
    uint64_t allocated;  /* NDM_ERR_BUDGET, NDM_ERR_CEILING: bytes reserved already, of what has the limit; else 0 */
    uint64_t waiting;    /* these: bytes that others are to have before, because they wait; else 0 */
    int64_t engine;      /* these and NDM_ERR_ENGINE: whose; else 0 */
} ndm_error;

/* Details of the last failure on this thread. The pointer stays good for the life of the thread, its contents
 * until the next failure. */
const ndm_error *ndm_last_error(void);

/* The library's own NDM_VERSION and NDM_ABI_VERSION. These and ndm_check_abi() stay as they are in every version. Any
 * thread. */
const char *ndm_version(void);
int64_t ndm_abi_version(void);

/* NDM_OK if a caller compiled against a header of ABI `abi` and version `version` may use this library: the same ABI,
 * and a library no older than the header. NDM_ERR_VERSION if not. Any thread. */
int ndm_check_abi(int64_t abi, int64_t version);

typedef struct {
    uint64_t initial_capacity; /* bytes of a new file; nobody looks at it where a file is there that is not empty */
    uint64_t max_capacity;     /* the ceiling; address space for all of it is reserved where the system allows. A file that
                                  is larger opens, and does not grow */
    uint64_t alignment;        /* of every value: a power of two, 1 to 4096 */
    uint64_t cache_limit;      /* bytes of the file that may stay in RAM; at least 4 MiB is used. UINT64_MAX: no limit */
    uint64_t recover;          /* 1: keep the values that an earlier region left; its alignment holds, too */
    uint64_t keep_mapped;      /* 0: pages of values of 64 KiB and more are in this process's RSS only while a view of them
                                  lives, whatever the limit. 1: they stay mapped after a view, so that viewing them again
                                  costs no faults; and values below 256 KiB are mapped once they are stored */
    uint64_t ownership;        /* an ndm_ownership: who may call */
} ndm_options;

/* Create or open the region at `path` (mode 0600), and lock it. The calling thread becomes its owner. The region
 * starts empty, but for bytes that a living reader leases (ndm_reader_lease), which are pinned. Beside it, `path` +
 * ".slots" holds the slot table. A path that is no regular file, or holds data that no region wrote, or has a slot
 * table of a newer version, is refused untouched. NULL on failure: NDM_ERR_ARGUMENT, NDM_ERR_BUSY (also: readers have the
 * old file open, and it cannot be punched), NDM_ERR_IO, NDM_ERR_MEMORY. All that may be refused comes before the values of
 * an earlier region are given up: where opening fails, they can still be recovered.
 *
 * The two files know each other by a random number, which the slot table notes and the data file bears as an extended
 * attribute (user.nodedb_mem.identity); on a file system without attributes, by the data file's inode number and time of
 * birth. So a closed region may be moved to another disk, or copied with attributes and times (`mv`, `cp -a`). With
 * `recover`, NDM_ERR_IO has
 *   EUCLEAN  the slot table is torn, its data file is gone, or a copy without its attribute, or both files are a copy that
 *            was made while the region was open, or were moved after its owner was killed
 *   EINVAL   the slot table is of another version, or of another region
 *   ENOENT   the slot table is missing, or the leases file is, and readers may hold leases
 *   EPERM    one of the files belongs to another user
 *   EEXIST   the data file or the slot table is not a region's
 * and others where the system refuses. */
ndm_region *ndm_region_open(const char *path, const ndm_options *options);

/* The same on an unnamed file in `directory`, whose blocks return to the file system when the region and its
 * views are gone, however the process ends. */
ndm_region *ndm_region_open_temporary(const char *directory, const ndm_options *options);

/* Close: the owner's verbs return NDM_ERR_CLOSED from now on. Live views stay readable; the mapping, the
 * descriptor and the lock go with the last of them. Closing twice is allowed. The struct itself stays until
 * ndm_region_destroy(). A region of many threads closes when those have come to their end that are inside a function; no
 * other comes in meanwhile. */
int ndm_region_close(ndm_region *region);

/* 1 if the region is closed or `region` is NULL, else 0. Any thread. */
int ndm_region_is_closed(const ndm_region *region);

/* 1 if the file is on tmpfs or ramfs, which have no other place for it than RAM, else 0. Any thread. */
int ndm_region_in_memory(const ndm_region *region);

enum ndm_medium { NDM_MEDIUM_DISK = 0, NDM_MEDIUM_TMPFS = 1, NDM_MEDIUM_RAMFS = 2, NDM_MEDIUM_OVERLAY = 3 };

/* What the file or folder at `path`, or a file that would be made there, lies on: an ndm_medium. NDM_MEDIUM_OVERLAY is an
 * overlay that writes to tmpfs or ramfs. NDM_MEDIUM_DISK also where the system does not say. Any thread. */
int ndm_path_medium(const char *path);

/* 1 if that is RAM, else 0. */
int ndm_path_in_memory(const char *path);

/* Hand the region over to another thread of this process. The owner releases it; from then on every verb returns
 * NDM_ERR_WRONG_THREAD on every thread, until a thread adopts it, and is its owner. A region whose owner's thread has
 * ended can be adopted, too. Adopting fails with NDM_ERR_WRONG_THREAD if the owner lives and does not release it within a tenth of a
 * second. A region of many threads is every thread's already: both do nothing. */
int ndm_region_release_ownership(ndm_region *region);
int ndm_region_adopt(ndm_region *region);

/* 1 if the region's mapping is locked in RAM (mlock, mlockall): then nothing can be dropped from it, by the cache limit or by
 * ndm_region_evict(). 0 if not. */
int ndm_region_is_locked(ndm_region *region);

/* 1 if whatever this process maps from now on is locked in RAM (mlockall with MCL_FUTURE), else 0. Any thread. */
int ndm_mappings_are_locked(void);

/* Give up the handle, closing the region if it is open. Any thread may do it, provided no other call on the region is
 * running or follows. In a forked child it frees the child's copy. NULL is ignored. */
void ndm_region_destroy(ndm_region *region);

/* Copy `size` bytes into a new slot and return its number, 0 or more. `data` may be a view of this region.
 * `engine` is 0 to 255. NDM_ERR_CAPACITY, NDM_ERR_IO (ENOSPC, EFBIG, EDQUOT, ...), NDM_ERR_MEMORY.
 *
 * Before this and the other writing verbs return NDM_ERR_CAPACITY or ENOSPC, they bring scattered free space together, by
 * moving values that are neither pinned nor leased: a request for which enough lies between those is not refused. */
int64_t ndm_region_write(ndm_region *region, const void *data, uint64_t size, int64_t engine);

/* Gather `count` parts into one new slot. If `aligned`, each part starts at a multiple of the region's alignment from
 * the value's start, and zeros fill the gaps; otherwise they follow each other. */
int64_t ndm_region_write_vectored(ndm_region *region, const void *const *parts, const uint64_t *sizes, uint64_t count,
                                  int aligned, int64_t engine);

/* A new slot of `size` zero bytes, to be filled in place through *view, which pins it: release it once. Errors as
 * ndm_region_write(), and NDM_ERR_IO with EOPNOTSUPP on a file system whose blocks a store might not get. */
int64_t ndm_region_allocate(ndm_region *region, uint64_t size, int64_t engine, char **view);

/* The value in an allocated slot is complete. */
int ndm_region_commit(ndm_region *region, int64_t slot);

/* The batch verbs read the arrays of lengths and slots more than once: nobody may write to them during the call.
 *
 * Write `count` values, all or none; their numbers go to `slots`. ..._packed(): the values lie one after the other at
 * `data`, `size` bytes in all, which is what the lengths must add up to (NDM_ERR_ARGUMENT). */
int ndm_region_write_many(ndm_region *region, const void *const *parts, const uint64_t *sizes, uint64_t count,
                          int64_t engine, int64_t *slots);
int ndm_region_write_packed(ndm_region *region, const void *data, uint64_t size, const int64_t *lengths, uint64_t count,
                            int64_t engine, int64_t *slots);

/* View `count` slots, all or none: release each view once. A slot may be listed twice. This verb and the next ask the disk
 * for all values that are not in RAM, in the order of the file, before the first is touched; the next one does so in
 * windows that fit under the cache limit. */
int ndm_region_read_many(ndm_region *region, const int64_t *slots, uint64_t count, const char **views, uint64_t *sizes);

/* Copy `count` values to `buffer`, one after the other, and their sizes to `lengths`; returns the bytes. If that is more
 * than `capacity`, nothing is copied: the number is the room that is needed. */
int64_t ndm_region_load_many(ndm_region *region, const int64_t *slots, uint64_t count, void *buffer, uint64_t capacity,
                             int64_t *lengths);

/* Free `count` slots, all or none. NDM_ERR_ARGUMENT if one is listed twice. */
int ndm_region_free_many(ndm_region *region, const int64_t *slots, uint64_t count);

/* A read-only view of a slot's bytes, and its size. Each view must be given to ndm_view_release() once. */
const char *ndm_region_read(ndm_region *region, int64_t slot, uint64_t *size);

/* The same, but for callers that must not wait for the disk, nor for another thread: NDM_ERR_WAIT where ndm_region_read()
 * might, which is no failure and leaves ndm_last_error() as it is. */
int ndm_region_try_read(ndm_region *region, int64_t slot, const char **view, uint64_t *size);

/* A private view that may be written to: copy-on-write, so that the stored bytes never change and untouched pages cost
 * no RAM of their own. It pins the slot like a read-only one. */
char *ndm_region_restore(ndm_region *region, int64_t slot, uint64_t *size);

/* End a view. Any thread, at any time, also after ndm_region_destroy(). In a forked child it ends the child's copy. NULL is
 * ignored. */
void ndm_view_release(const char *view);

/* The same, but NDM_ERR_WAIT, with the view as it was, where that would unmap memory: of a value of 64 KiB and more
 * (unless keep_mapped is set), of a restored one, or of a closed region. ndm_last_error() stays as it is. */
int ndm_view_try_release(const char *view);

/* Copy a slot's bytes to `buffer` and return their number. If that is more than `capacity`, copy nothing: the
 * number is the room that is needed. */
int64_t ndm_region_read_into(ndm_region *region, int64_t slot, void *buffer, uint64_t capacity);

/* Free a slot: its number is invalid from now on and may be given out again; its bytes may be reused as soon as
 * no view of them is left. */
int ndm_region_free(ndm_region *region, int64_t slot);

typedef struct {
    uint64_t offset;     /* of the value in the file */
    uint64_t size;       /* bytes as written */
    uint32_t generation; /* grows each time the slot is freed */
    uint8_t engine;
    uint8_t occupied;    /* 0 after free; the other fields then describe the freed value */
} ndm_slot;

/* Describe a slot, live or freed. */
int ndm_region_slot(ndm_region *region, int64_t slot, ndm_slot *out);

/* 1 if the slot is live, 0 if not. */
int ndm_region_contains(ndm_region *region, int64_t slot);

typedef struct {
    uint64_t capacity;     /* bytes of file */
    uint64_t max_capacity; /* the ceiling */
    uint64_t used_bytes;   /* end of the furthest byte ever allocated */
    uint64_t live_bytes;   /* sum of the sizes of live values */
    uint64_t free_bytes;   /* below used_bytes, ready for reuse */
    uint64_t pinned_bytes; /* freed, but waiting for a view or a lease to end */
    uint64_t largest_free_bytes; /* the longest free extent */
    uint64_t slot_count;   /* entries of the slot table, live or freed */
    uint64_t live_slots;
    uint64_t growths;      /* times the file was extended */
    uint64_t moved_bytes;  /* by ndm_region_compact(), so far */
    uint64_t disk_bytes;   /* blocks that the file system has given to the file */
    uint64_t alignment;    /* of every value */
    uint64_t can_punch;    /* 1; 0 once the file system has refused to punch a hole */
    uint64_t resident_bytes;  /* of the file, in RAM now: page cache and RSS together */
    uint64_t unwritten_bytes; /* of these, not yet on disk; 0 before Linux 6.5, which does not count them */
    uint64_t written_back_bytes; /* whose write-back the background writer has started, so far */
    uint64_t engine_bytes[256]; /* live bytes by engine */
    uint64_t engine_slots[256]; /* live slots by engine */
} ndm_stats;

/* All figures. Constant time, but for resident_bytes and unwritten_bytes: linear in the pages that are in RAM. The
 * next other call reports a write-back that has failed; this one does not. */
int ndm_region_stats(ndm_region *region, ndm_stats *out);

typedef struct {
    uint64_t capacity, max_capacity, used_bytes, live_bytes, slot_count, live_slots, alignment;
} ndm_info;

/* The figures of ndm_stats that take no system call. */
int ndm_region_info(ndm_region *region, ndm_info *out);

/* Raise the ceiling. Lowering it is NDM_ERR_ARGUMENT. */
int ndm_region_set_max_capacity(ndm_region *region, uint64_t max_capacity);

/* Lower the high-water mark past free space at its end, shrink the file to it (not below its size at open), and give
 * the blocks of free extents of 64 KiB and more back to the file system. Returns the bytes of disk given back. Space
 * given back gets blocks again before it is touched. While a view of ndm_region_allocate() lives, only whole, aligned
 * 512 KiB of a free extent are given back, or 2 MiB where a large value was. While readers are there, the file keeps its
 * size and its end becomes a hole; on tmpfs and on overlays nothing is given back then, because a reader's look at a hole
 * may be SIGBUS there. Linear in the number of extents. */
int64_t ndm_region_trim(ndm_region *region);

/* The same in pieces: it stops when it has gone through `budget` bytes of free space, and the next call goes on from there. 0
 * when there is nothing left to give back. */
int64_t ndm_region_trim_some(ndm_region *region, uint64_t budget);

typedef struct {
    uint64_t moved_bytes;     /* by this call */
    uint64_t remaining_bytes; /* of holes that more calls with this budget may close; 0 when nothing is left to do */
} ndm_compaction;

/* Gather free space by moving values, at most `budget` bytes of them: to the start of the file, or into other holes.
 * Slots keep their numbers. A value that is pinned, leased, or larger than the budget, stays where it is. Done when the
 * holes are under 1 % of the live bytes, or nothing can move. A whole compaction (UINT64_MAX) goes through the file once;
 * where the values are not in RAM, calls with a budget do a piece of that each, and read at most 2 MiB and six times the
 * budget from disk, some 512 KiB more or less. NDM_ERR_IO with ENOSPC when a hole's blocks cannot be had
 * back: every value is intact, *out is not written. */
int ndm_region_compact(ndm_region *region, uint64_t budget, ndm_compaction *out);

/* Wait until all values are written back, and drop the `count` values in `slots` from RAM; `slots` NULL: all values
 * without a live view. Pages that a value shares with others go with it; a view of them still works, reading from disk
 * when touched. NDM_ERR_NO_SLOT or NDM_ERR_FREED_SLOT before anything is done.
 *
 * NDM_ERR_IO, here and from ndm_region_flush(), when write-back failed, now or since the last call; nothing is dropped.
 * All that is in RAM stays there and is tried again by the next of these calls, which takes it for written once it was
 * read back from the disk and found equal. What the kernel failed to write and dropped before the failure came to light
 * is lost, and so may be a value dropped earlier, if the file system's own blocks could not be written after it. */
int ndm_region_evict(ndm_region *region, const int64_t *slots, uint64_t count);

/* The `count` values in `slots` are about to be read, one by one or in one call: ask the disk for those that are not in
 * RAM, all together and in the order of the file, and do not wait for them. Values that need more room than half the cache
 * limit are not all asked for. The batch verbs that read do this by themselves. NDM_ERR_NO_SLOT or NDM_ERR_FREED_SLOT
 * before anything is done. */
int ndm_region_prefetch(ndm_region *region, const int64_t *slots, uint64_t count);

/* Wait until every value is written back to the disk (not for the disk's own cache). */
int ndm_region_flush(ndm_region *region);

/* Let readers lease values from now on: makes the leases file (`path` + ".leases"). Done already is fine. NDM_ERR_IO with
 * EPERM if the process has another user than when it opened the region: the next owner would refuse the file.
 * From now on the space of freed values is free when 64 of them, or 256 KiB, have come, because it takes a system call to
 * know that nobody leases them. ndm_region_info(), _stats(), _trim(), _compact(), and a write that would make the file grow,
 * ask before that. */
int ndm_region_allow_leases(ndm_region *region);

/* Descriptors of the data file, the slot table and the leases (-1: none), for readers of a temporary region, which open
 * /proc/<pid>/fd/<number>; and the incarnation, which is another each time a region is opened anew. */
typedef struct {
    int32_t data, slots, leases;
    uint32_t generation; /* of the slot asked for */
    uint64_t incarnation;
} ndm_shared;

/* NDM_ERR_IO with ENOENT if one of the files was removed: no reader would find it. */
int ndm_region_share(ndm_region *region, int64_t slot, ndm_shared *out);

/* Walk every invariant of the region's bookkeeping and return how many are broken: 0 in a sound region. Linear in
 * the number of slots and extents. For tests and for hunting a bug. */
int64_t ndm_region_check(ndm_region *region);

/* ---- readers ----
 *
 * A reader opens a region's files for reading only, in any thread or process, while the owner works, and follows its
 * growth, trimming and compaction by itself. It may be used from every thread of the process that opened it.
 *
 * Memory order: the owner takes no lock. It publishes a value with release stores of its record, and withdraws it, with
 * a fence, before its bytes may change; a slot's generation grows with each free. A reader loads the record (acquire),
 * reads the bytes, and after an acquire fence loads the record again: unchanged means that the bytes are the value's.
 * This is a sequence lock per record, in C11 atomics; it holds on aarch64 as on x86-64.
 *
 * A view from a reader pins nothing: the owner may free, move and overwrite the value meanwhile. Copy
 * (ndm_reader_copy) or check afterwards (ndm_reader_is_unchanged), or lease.
 *
 * No function waits for the owner longer than some 20 ms, nor with a lock held that other threads of the reader want. While
 * the owner moves the value, ndm_reader_find(), ndm_reader_read(), ndm_reader_copy(), their batches, ndm_reader_lease() and
 * ndm_reader_next() end with NDM_ERR_WAIT after that time, and ndm_reader_open() does so while another process bars readers
 * from the slot table. Nothing has been done then: call again, as often as you like. An owner that died while it moved a
 * value is NDM_ERR_STALE.
 *
 * If somebody cut a file short under a reader, the functions return NDM_ERR_IO with EIO. The reader asks for the lengths of its
 * files, but not twice within two microseconds: what is cut off in that time, and touched, is SIGBUS. So is what is missing
 * under a view. */

typedef struct ndm_reader ndm_reader;

typedef struct {
    int64_t slot;
    uint64_t offset, size;
    uint64_t place;      /* changes when the value is moved */
    uint64_t turns;      /* changes before a `place` can come again */
    uint32_t generation; /* changes when the slot is freed */
    uint8_t engine;
    uint8_t state;
} ndm_value;

/* Open the region whose data file, slot table and leases are at these paths. NULL on failure: NDM_ERR_IO (EINVAL: not a
 * region, of another version or cut short; EUCLEAN: torn, or a copy, as ndm_region_open() says), NDM_ERR_WAIT,
 * NDM_ERR_MEMORY. The leases are opened to write with the first lease. */
ndm_reader *ndm_reader_open(const char *data_path, const char *slots_path, const char *leases_path);

/* Close: views stay readable, and keep the region's file from being shortened. Leases end. Any thread; twice is fine. */
void ndm_reader_close(ndm_reader *reader);
void ndm_reader_destroy(ndm_reader *reader);

/* Look a live slot up. `generation` -1: any. NDM_ERR_NO_SLOT, NDM_ERR_FREED_SLOT, NDM_ERR_STALE,
 * NDM_ERR_UNCOMMITTED. */
int ndm_reader_find(ndm_reader *reader, int64_t slot, int64_t generation, ndm_value *out);

/* A view of a value, to be given to ndm_view_release() once. */
const char *ndm_reader_read(ndm_reader *reader, int64_t slot, int64_t generation, ndm_value *out);

/* Copy a value, never torn. Returns its size; if that is more than `capacity`, nothing is copied. */
int64_t ndm_reader_copy(ndm_reader *reader, int64_t slot, int64_t generation, void *buffer, uint64_t capacity);

/* View or copy `count` values, all or none, as ndm_region_read_many() and ndm_region_load_many() do; `generations` NULL: any.
 * What is not in RAM is asked for in the order of the file. Each copy is whole; all of them together are not of one moment.
 * If one value is gone, the call fails with NDM_ERR_NO_SLOT, _FREED_SLOT, _UNCOMMITTED or _STALE, and ndm_error.slot names
 * it; the contents of `buffer` are undefined then. */
int ndm_reader_read_many(ndm_reader *reader, const int64_t *slots, const int64_t *generations, uint64_t count,
                         const char **views, uint64_t *sizes);
int64_t ndm_reader_load_many(ndm_reader *reader, const int64_t *slots, const int64_t *generations, uint64_t count,
                             void *buffer, uint64_t capacity, int64_t *lengths);

/* 1 if the value is live and its bytes are where and what they were when `value` was looked up, 0 if not. */
int ndm_reader_is_unchanged(ndm_reader *reader, const ndm_value *value);

/* The first live slot that is `from` or more; NDM_ERR_NO_SLOT if no live slot follows. Slots that are freed or not committed
 * are passed over; for any other reason why a slot gives no value the call fails (EUCLEAN: the table is torn). NDM_ERR_WAIT
 * also after many slots that are not live: in this one case of a failure *out is written, and its `slot` is where to go
 * on. */
int ndm_reader_next(ndm_reader *reader, int64_t from, ndm_value *out);

typedef struct {
    uint64_t incarnation;
    uint64_t capacity, max_capacity, used_bytes, live_bytes, slot_count, alignment;
    uint64_t resident_bytes; /* NDM_BYTES_UNKNOWN: the kernel hides it from a user who neither owns the file nor may write to it */
    uint64_t pinned_bytes; /* freed, but waiting for a view of the owner's or a lease to end, or for the owner to ask for leases */
    uint64_t leases; /* held by living processes; UINT64_MAX: the leases file may not be read, or is not one */
    uint64_t owner; /* process id of the owner; 0 if no owner lives */
} ndm_reader_figures;

/* Figures, as the owner last published them. */
int ndm_reader_stats(ndm_reader *reader, ndm_reader_figures *out);

/* Keep a value where it is, until ndm_reader_release() or the end of this process: through the owner's free and compact,
 * and through its death, if the next owner recovers the file. A next owner that starts afresh ends the value, not its
 * bytes: the verbs return NDM_ERR_STALE, and the view stays good until the release. Returns the lease's number, and a view.
 * NDM_ERR_IO with ENOENT if the owner has not allowed leases, EAGAIN if all are taken; NDM_ERR_STALE also if another
 * region's files stand at the path by now. */
int64_t ndm_reader_lease(ndm_reader *reader, int64_t slot, int64_t generation, const char **view, ndm_value *out);
int ndm_reader_release(ndm_reader *reader, int64_t lease);

enum { NDM_MOST_LEASES = 2000 }; /* of one region at a time */

typedef struct {
    uint64_t offset, size; /* of a value in the file, live or freed */
} ndm_leased;

/* How many leases living processes hold, by this reader and others, and what the first `capacity` of them keep, each
 * lease for itself. Reads the leases file only. 0 if no leases file exists. */
int64_t ndm_reader_leases(ndm_reader *reader, ndm_leased *places, uint64_t capacity);

/* ---- Pins: views for native code ----
 *
 * A pin is a view (ndm_region_read), typed as bytes. From ndm_region_pin() to the matching ndm_region_unpin() the
 * address stays good and the bytes stay as they are: through writes and growth, after ndm_region_free() of the slot,
 * after ndm_region_close(), and after the Python object is gone. Pins of one slot are counted. A pin that is never
 * ended keeps its extent from reuse and the file locked until the process ends. Python's views and native pins are
 * of one kind: each keeps the bytes for the other. */

/* Pin a live slot; *size is written unless `size` is NULL. Owner only. NULL on failure. */
const uint8_t *ndm_region_pin(ndm_region *region, int64_t slot, uint64_t *size);

/* End a pin, given the address that ndm_region_pin() or ndm_h_pin() returned. Any thread; NULL is ignored. */
void ndm_region_unpin(const uint8_t *data);

/* ---- Handles: regions by number ----
 *
 * For callers that cannot hold an ndm_region * (numba), or do not know how long it lives (native code that got a
 * region from Python: OverflowRegion.handle). A handle is never 0, never used again, below 2^63, and owns nothing.
 * Once its region is closed or destroyed, and for a number that never was a handle, ndm_h_* return NDM_ERR_CLOSED.
 * The owner rule holds: where ndm_region_* would return NDM_ERR_WRONG_THREAD, so do they. If ndm_region_destroy() comes
 * from another thread while some are inside ndm_h_* calls, the region goes when the last of these calls returns. Otherwise each is the ndm_region_* function of the same name. But for ndm_h_region(), none
 * takes or returns an opaque or void pointer. */

/* The region's handle: the same each time. Owner only. 0 on failure. */
uint64_t ndm_region_handle(ndm_region *region);

/* The region itself, for the other functions; good for as long as it is not destroyed. NULL on failure. */
ndm_region *ndm_h_region(uint64_t handle);

int64_t ndm_h_write(uint64_t handle, const uint8_t *data, uint64_t size, int64_t engine);
int64_t ndm_h_read_into(uint64_t handle, int64_t slot, uint8_t *buffer, uint64_t capacity);
const uint8_t *ndm_h_pin(uint64_t handle, int64_t slot, uint64_t *size); /* to be ended by ndm_region_unpin() */
int ndm_h_free(uint64_t handle, int64_t slot);
int ndm_h_contains(uint64_t handle, int64_t slot);

/* Bytes of the value in a live slot. */
int64_t ndm_h_size(uint64_t handle, int64_t slot);

/* [/cdef] */

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif

#include "nodedb_mem_governor.h"

#endif
