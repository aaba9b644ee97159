/* How bytes get into the file, and how much of it stays in RAM.
 *
 * The first promise: a byte is stored through the mapping only after the file system has given its whole neighbourhood
 * blocks, so that a full disk is a status and never SIGBUS. A store into a clean page makes the file system find
 * blocks for the whole folio that holds the page, and folios may be large. So every write is cut at grains, aligned
 * pieces of 512 KiB, which keeps each folio inside one grain, and memcpy is for grains that have all their blocks:
 *
 *   EMPTY    no value has a byte in it, and it was not touched since the file was made. It has blocks if it lies below
 *            `allocated`.
 *   HOLE     no value has a byte in it, and it may lack blocks.
 *   PARTIAL  it holds values, but may lack blocks elsewhere: pwrite only, until it gets them.
 *   READY    it has all its blocks, and was not dropped from RAM since it was written: memcpy.
 *   BEGUN    it has all its blocks, and pwrite has put values into a part of it. A store to the rest would find no page
 *            there, and get one per fault: pwrite for large values, and for small ones the rest is zeroed first.
 *   DROPPED  it has all its blocks and holds values, but was dropped from RAM: pwrite, because memcpy would first read
 *            the old bytes back page by page.
 *
 * The second: where a limit is set, a background thread starts write-back of grains as they come to RAM, and drops the
 * oldest (cache.c). The thread is started when half the limit is in use and ends with the region. The owner waits for
 * it only while more than the limit is in RAM. A forked child has no such thread and needs none.
 */
#ifndef NDM_GRAINS_H
#define NDM_GRAINS_H

#include "os/file.h"
#include "store/seen.h"

#include <pthread.h>

#define NDM_I_UNLIMITED UINT64_MAX

enum { NDM_I_EMPTY, NDM_I_HOLE, NDM_I_PARTIAL, NDM_I_READY, NDM_I_BEGUN, NDM_I_DROPPED };

/* What a grain is to the cache. */
enum {
    NDM_I_QUEUED = 1, /* some of it may be in RAM; it stands in the queue */
    NDM_I_RECENT = 2, /* read since it was queued: it gets a second round */
    NDM_I_DIRECT = 4  /* pwrite has written to it: where its pages are mapped, it is by views, and read-only */
};

typedef struct {
    uint64_t limit; /* grains; NDM_I_UNLIMITED: no queue is kept and no thread runs */
    pthread_mutex_t lock;
    pthread_mutex_t disk; /* held from waiting for write-back until the pages are dropped, or an error is dealt with: the
                             kernel reports a failure once, to whoever waits. Never taken with `lock` held. */
    pthread_cond_t work, room;
    pthread_t thread;
    bool running, stopping;
    uint32_t *queue; /* ring of grain numbers in the order they came to RAM; stale where the grain is not QUEUED */
    uint64_t queue_room, head, kicked, tail; /* counters; [head, kicked) is being written back; `& (room - 1)` indexes */
    uint64_t resident;     /* QUEUED grains, and those being dropped */
    uint64_t written_back; /* bytes whose write-back was started */
    _Atomic uint64_t drops; /* times that something was dropped */
    _Atomic int error;     /* errno of a failed write-back, for the owner's next call */
    bool suspect;          /* one has failed, and what is in RAM was not yet found on disk since. Owner only. */
} ndm_i_cache;

typedef struct {
    ndm_i_backing *file;
    _Atomic uint8_t *states; /* of each grain of the capacity; written under the cache's lock */
    _Atomic uint8_t *marks;  /* NDM_I_QUEUED, ... */
    uint64_t room;           /* grains that `states` and `marks` have room for */
    uint64_t allocated;      /* EMPTY grains below have their blocks */
    uint64_t pwrite_from;    /* cold values from this size on go by pwrite */
    const _Atomic uint64_t *storing; /* extents that others may be storing to, through the mapping; or NULL */
    ndm_i_seen *seen;        /* what need not be fetched */
    ndm_i_cache cache;
} ndm_i_grains;

/* For a file that has been started. `cache_limit`: bytes, or NDM_I_UNLIMITED. */
int ndm_i_grains_init(ndm_i_grains *grains, ndm_i_backing *file, uint64_t cache_limit);

/* The file has bytes from before; those of [offset, offset + size) are a value's. */
void ndm_i_grains_adopt(ndm_i_grains *grains, uint64_t offset, uint64_t size);
void ndm_i_grains_adopt_rest(ndm_i_grains *grains); /* the others are no value's */

void ndm_i_grains_fini(ndm_i_grains *grains); /* ends the thread */

/* As ndm_i_backing_grow() and ndm_i_backing_shrink(). */
int ndm_i_grains_grow(ndm_i_grains *grains, uint64_t needed, uint64_t wanted, uint64_t ceiling);
void ndm_i_grains_shrink(ndm_i_grains *grains, uint64_t capacity);

/* Copy `size` bytes to `offset`, by the way that suits the size and the grains. No value lies in [offset, vacant). */
int ndm_i_grains_store(ndm_i_grains *grains, uint64_t offset, const void *data, uint64_t size, uint64_t vacant);

/* Zero [offset, offset + size), and make it safe to store to through the mapping. */
int ndm_i_grains_clear(ndm_i_grains *grains, uint64_t offset, uint64_t size, uint64_t vacant);

/* Copy `size` bytes from one place of the file to another, from `*moved` on, front to back in pieces that overlap only
 * what has been copied; `*moved` counts what has, so that a copy cut off by a crash can go on. */
int ndm_i_grains_move(ndm_i_grains *grains, uint64_t from, uint64_t to, uint64_t size, _Atomic uint64_t *moved);

/* [offset, offset + size) is about to be read through the mapping: large or dropped ranges are fetched in one go. */
void ndm_i_grains_fetch(ndm_i_grains *grains, uint64_t offset, uint64_t size);

/* Is there nothing to fetch? Then ndm_i_grains_fetch() does nothing; otherwise it may wait for the disk. */
bool ndm_i_grains_at_hand(const ndm_i_grains *grains, uint64_t offset, uint64_t size);

/* Copy [offset, offset + size) out. */
int ndm_i_grains_load(ndm_i_grains *grains, uint64_t offset, void *buffer, uint64_t size);

/* Give back the blocks of the whole pages in [offset, offset + size), which hold no value; if `stored_to`, somebody may
 * be storing through the mapping anywhere else, and only whole grains lose their blocks. Does nothing where the file
 * system cannot. */
void ndm_i_grains_punch(ndm_i_grains *grains, uint64_t offset, uint64_t size, bool stored_to);

/* Write [start, end) back and drop it from RAM. What shares folios with its ends goes along (`neighbours`), or keeps
 * them there. */
int ndm_i_grains_evict(ndm_i_grains *grains, uint64_t start, uint64_t end, bool neighbours);

/* ---- cache.c ---- */

int ndm_i_cache_init(ndm_i_cache *cache, const ndm_i_backing *file, uint64_t limit);
void ndm_i_cache_fini(ndm_i_cache *cache);

/* The owner has brought bytes of the grains [first, last) to RAM. May wait until there is room. */
void ndm_i_cache_admit(ndm_i_grains *grains, uint64_t first, uint64_t last);

/* Wait for write-back of [start, end), and drop it from RAM if `drop`. If that fails, or has failed in the background,
 * nothing is dropped, and all that is in RAM is rescued; and again by each call, until all of it is found on disk. Owner
 * only. 0 or errno. */
int ndm_i_cache_settle(ndm_i_grains *grains, uint64_t start, uint64_t end, bool drop);

/* The grains [first, last) are not in RAM any more. With the lock held. */
void ndm_i_cache_forget(ndm_i_grains *grains, uint64_t first, uint64_t last);

/* ---- rescue.c ---- */

/* Write-back has failed: have all that is in RAM on disk, or make it dirty again. Begins with the grain of `from`, which
 * is most in danger. 0 if all of it was found on disk; otherwise errno. `*lost`: errno of what could not be written again
 * either. Owner only, with `disk` held. */
int ndm_i_rescue(ndm_i_grains *grains, uint64_t from, int *lost);

static inline void ndm_i_cache_lock(ndm_i_cache *cache)
{
    if (cache->limit != NDM_I_UNLIMITED)
        pthread_mutex_lock(&cache->lock);
}

static inline void ndm_i_cache_unlock(ndm_i_cache *cache)
{
    if (cache->limit != NDM_I_UNLIMITED)
        pthread_mutex_unlock(&cache->lock);
}

#endif
