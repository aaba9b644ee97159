/* Bytes in and out of the file: the one way by which values are stored, moved and loaded, and space given back.
 *
 * The promise: a byte is stored through the mapping only after the file system has given its whole neighbourhood blocks,
 * so that a full disk is a status and never SIGBUS. By which way bytes go, memcpy or pwrite, follows from their number and
 * from the states of the grains they touch (grains.h).
 *
 * Values of NDM_I_LARGE and more are not mapped unless a view of them lives: they are stored by pwrite, and what a view, or
 * a move, has mapped of them is forgotten after it. Small values are stored and copied out through the mapping. That maps
 * their neighbours, too; where one of these is large, the 2 MiB are a stray, and a new stray has the oldest forgotten. A
 * store that keeps things mapped does none of this, and treats values below 256 KiB like small ones.
 *
 * Where many threads use a region, what waits for the disk may let others in meanwhile (gate.h): put(), fetch(), load_many()
 * and the other calls that bring grains to RAM. Then the caller holds the extents that it named, and nothing else is as it
 * was. It has to allow that. Others may store nothing to the bytes in [offset, vacant) of a put() before the call, and
 * may afterwards.
 */
#ifndef NDM_STORE_H
#define NDM_STORE_H

#include "store/grains.h"
#include "store/seen.h"
#include "store/writer.h"

enum { NDM_I_STRAYS = 2 };

typedef struct {
    ndm_i_file *file;
    ndm_i_grains grains;
    ndm_i_writer writer;
    ndm_i_seen *seen;     /* what need not be fetched */
    uint64_t misses;      /* times that something had to be fetched */
    uint64_t allocated;   /* EMPTY grains below have their blocks */
    uint64_t direct_from; /* values from this size on go by pwrite and pread */
    uint64_t pwrite_from; /* to a cold place, values from this size on go by pwrite */
    uint64_t strays[NDM_I_STRAYS]; /* numbers of 2 MiB, and one; 0: none */
    unsigned next_stray;
    uint64_t forget_from; /* pages of values from this size on are forgotten: NDM_I_LARGE, or UINT64_MAX to keep them mapped */
    unsigned unwatched, watched; /* stores to come that are not watched for faults, that are (watch.h) */
    unsigned faults;      /* seen in a row */
    uint8_t round;        /* of write-back, as far as faults show */
    uint64_t fetched;     /* bytes of grains that were read as a whole */
    uint64_t asked;       /* the last of them that is about to be read from, plus 1 */
} ndm_i_store;

/* For a file that has been started. `storing` counts the extents that others may be storing to through the mapping;
 * `cache_limit`: bytes, or NDM_I_UNLIMITED; `keep_mapped`: large values stay mapped after a view. */
int ndm_i_store_init(ndm_i_store *store, ndm_i_file *file, const _Atomic uint64_t *storing, uint64_t cache_limit,
                     bool keep_mapped);
void ndm_i_store_fini(ndm_i_store *store); /* ends the writer's thread */

/* As ndm_i_file_grow() and ndm_i_file_shrink(). */
int ndm_i_store_grow(ndm_i_store *store, uint64_t needed, uint64_t wanted, uint64_t ceiling);
void ndm_i_store_shrink(ndm_i_store *store, uint64_t capacity);

/* Copy `size` bytes to `offset`, by the way that suits the size and the grains. No value lies in [offset, vacant). */
int ndm_i_store_put(ndm_i_store *store, uint64_t offset, const void *data, uint64_t size, uint64_t vacant);

/* Zero [offset, offset + size), and make it safe to store to through the mapping. The caller admits its grains to RAM (writer.h)
 * once a writable view keeps their blocks from others. */
int ndm_i_store_clear(ndm_i_store *store, uint64_t offset, uint64_t size, uint64_t vacant);

/* Copy `size` bytes from one place of the file to another, from `*moved` on, front to back in pieces that overlap only
 * what has been copied; `*moved` counts what has, so that a copy cut off by a crash can go on. No value lies in
 * [to, vacant). */
int ndm_i_store_move(ndm_i_store *store, uint64_t from, uint64_t to, uint64_t size, uint64_t vacant,
                     _Atomic uint64_t *moved);

/* [offset, offset + size) is about to be read at `address`, where it is mapped: large or dropped ranges are fetched in one
 * go. The mapping has to stay if others may come in. */
void ndm_i_store_fetch(ndm_i_store *store, uint64_t offset, const void *address, uint64_t size);

/* Is there nothing to fetch? Then ndm_i_store_fetch() does nothing; otherwise it may wait for the disk. */
bool ndm_i_store_at_hand(const ndm_i_store *store, uint64_t offset, uint64_t size);

/* Copy [offset, offset + size) out. */
int ndm_i_store_load(ndm_i_store *store, uint64_t offset, void *buffer, uint64_t size);

/* The same, of bytes that a view at `address` keeps where they are, by any thread. */
int ndm_i_store_load_viewed(const ndm_i_store *store, uint64_t offset, const void *address, void *buffer, uint64_t size);

/* The same, where the writer knows already, and nothing is left to fetch. */
int ndm_i_store_copy_out(ndm_i_store *store, uint64_t offset, void *buffer, uint64_t size);

/* Give back the blocks of the whole pages in [offset, offset + size), which hold no value; if `stored_to`, somebody may
 * be storing through the mapping anywhere else, and only whole grains lose their blocks. Does nothing where the file
 * system cannot. Returns whether there was anything to do. */
bool ndm_i_store_punch(ndm_i_store *store, uint64_t offset, uint64_t size, bool stored_to);

/* Write [start, end) back and drop it from RAM. What shares folios with its ends goes along (`neighbours`), or keeps
 * them there. */
int ndm_i_store_evict(ndm_i_store *store, uint64_t start, uint64_t end, bool neighbours);

/* Wait until all is written back. */
int ndm_i_store_flush(ndm_i_store *store);

/* Has a write-back failed in the background? Then the next settling call reports it. */
static inline bool ndm_i_store_has_failed(const ndm_i_store *store)
{
    return atomic_load_explicit(&store->writer.error, memory_order_relaxed) != 0;
}

/* Does a view of this value have to be forgotten after it? Of a large one, and of a small one in 2 MiB with a large one. If so,
 * `*wide` says whether its folios may have more than a grain. */
static inline bool ndm_i_store_forgets(const ndm_i_store *store, uint64_t offset, uint64_t size, bool *wide)
{
    if (size < store->forget_from && (store->forget_from == UINT64_MAX ||
                                      !ndm_i_grains_hold_large(&store->grains, offset, offset + size)))
        return false;
    *wide = ndm_i_grains_are_wide(&store->grains, offset / NDM_I_GRAIN) ||
            ndm_i_grains_are_wide(&store->grains, (offset + size - 1) / NDM_I_GRAIN);
    return true;
}

/* To be taken before what it is noted with: see seen.h. */
static inline uint64_t ndm_i_store_moment(const ndm_i_store *store)
{
    return ndm_i_seen_moment(atomic_load_explicit(&store->writer.drops, memory_order_acquire));
}

/* How many invariants of the grains and of the writer are broken. */
uint64_t ndm_i_store_check(ndm_i_store *store);

#endif
