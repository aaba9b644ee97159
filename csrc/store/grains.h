/* The state table of grains: what each aligned piece of 512 KiB of the file is like. Bytes of memory only; no system call.
 *
 * A store into a clean page makes the file system find blocks for the whole folio that holds the page, and folios may be
 * large. So writes are cut at grains, which keeps each folio inside one of them, and what may be done to a grain is told by
 * its state:
 *
 *   EMPTY    no value has a byte in it, and it was not touched since the file was made. It has blocks if it lies below
 *            what the store has allocated ahead.
 *   HOLE     no value has a byte in it, and it may lack blocks.
 *   PARTIAL  it holds values, but may lack blocks elsewhere: pwrite only, until it gets them.
 *   READY    it has all its blocks, and was not dropped from RAM since it was written: memcpy.
 *   BEGUN    it has all its blocks, and pwrite has put values into a part of it. A store to the rest would find no page
 *            there, and get one per fault: pwrite for large values, and for small ones the rest is zeroed first.
 *   DROPPED  it has all its blocks and holds values, but was dropped from RAM: pwrite, because memcpy would first read
 *            the old bytes back page by page.
 *
 * Where a large value fills an aligned 2 MiB, or 1 MiB, these are written in one piece, and get one folio, mapped by one
 * fault. Its grains are WIDE then, and all of an aligned 2 MiB with a WIDE grain share their fate: before a store through the
 * mapping all of them have their blocks; if one loses blocks, the others are PARTIAL, too; and they are dropped together.
 *
 * States are changed by the owner, and by the background writer (READY and BEGUN to DROPPED) under its lock. The table
 * itself is replaced under that lock only.
 */
#ifndef NDM_GRAINS_H
#define NDM_GRAINS_H

#include "os/bits.h"
#include "os/file.h"

#include <assert.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum { NDM_I_EMPTY, NDM_I_HOLE, NDM_I_PARTIAL, NDM_I_READY, NDM_I_BEGUN, NDM_I_DROPPED };

/* What a grain is to the background writer. */
enum {
    NDM_I_QUEUED = 1, /* some of it may be in RAM; it stands in the queue */
    NDM_I_RECENT = 2, /* read since it was queued: it gets a second round */
    NDM_I_WIDE = 4    /* it may share a folio with its neighbours in the same 2 MiB */
};

typedef struct {
    _Atomic uint8_t *states;
    _Atomic uint8_t *marks; /* NDM_I_QUEUED, ... */
    uint8_t *large;         /* how many large values have bytes in each 2 MiB, in the books. Owner only. */
    uint8_t *rounds;        /* the round of write-back since which it is mapped for writing: see watch.h. Owner only. */
    uint64_t large_values;  /* the same, of the file */
    uint64_t room;          /* grains that all have room for */
    bool huge_folios;       /* the file may have some: what was adopted is WIDE */
} ndm_i_grains;

/* The grains that bytes [start, end) touch are [start / NDM_I_GRAIN, ndm_i_grains_end(end)). */
static inline uint64_t ndm_i_grains_end(uint64_t end) { return (end + NDM_I_GRAIN - 1) / NDM_I_GRAIN; }

static inline uint8_t ndm_i_grain_state(const ndm_i_grains *grains, uint64_t grain)
{
    assert(grain < grains->room);
    return atomic_load_explicit(&grains->states[grain], memory_order_relaxed);
}

static inline void ndm_i_grain_set_state(ndm_i_grains *grains, uint64_t grain, uint8_t state)
{
    assert(grain < grains->room && state <= NDM_I_DROPPED);
    atomic_store_explicit(&grains->states[grain], state, memory_order_relaxed);
}

static inline bool ndm_i_grain_is(const ndm_i_grains *grains, uint64_t grain, uint8_t mark)
{
    return grain < grains->room && atomic_load_explicit(&grains->marks[grain], memory_order_relaxed) & mark;
}

static inline void ndm_i_grain_mark(ndm_i_grains *grains, uint64_t grain, uint8_t mark)
{
    assert(grain < grains->room);
    atomic_fetch_or(&grains->marks[grain], mark);
}

static inline void ndm_i_grain_unmark(ndm_i_grains *grains, uint64_t grain, uint8_t mark)
{
    assert(grain < grains->room);
    atomic_fetch_and(&grains->marks[grain], (uint8_t)~mark);
}

/* Large values are not to stay mapped, and a fault maps all of a folio: who looks at a small one in the same 2 MiB has to
 * forget. Of a value that is entered (1) or removed (-1), if it is large: */
#define NDM_I_LARGE ((uint64_t)64 << 10)

static inline void ndm_i_grains_count_large(ndm_i_grains *grains, uint64_t offset, uint64_t size, int change)
{
    if (size < NDM_I_LARGE)
        return;
    grains->large_values += (uint64_t)change;
    for (uint64_t i = offset / NDM_I_HUGE; i <= (offset + size - 1) / NDM_I_HUGE; i++) {
        assert(i < grains->room && (change > 0 || grains->large[i] > 0));
        grains->large[i] = (uint8_t)(grains->large[i] + change);
    }
}

/* Has a large value bytes in the 2 MiB of a small one, [offset, end)? */
static inline bool ndm_i_grains_hold_large(const ndm_i_grains *grains, uint64_t offset, uint64_t end)
{
    assert(end > offset && end <= grains->room * NDM_I_GRAIN);
    return grains->large_values > 0 &&
           (grains->large[offset / NDM_I_HUGE] > 0 || grains->large[(end - 1) / NDM_I_HUGE] > 0);
}

/* Make room for `count` grains; new ones are EMPTY. false: no memory. */
bool ndm_i_grains_reserve(ndm_i_grains *grains, uint64_t count);
void ndm_i_grains_fini(ndm_i_grains *grains);

/* What may share a folio with grains of [first, last): widens the range, up to `count` grains. */
void ndm_i_grains_widen(const ndm_i_grains *grains, uint64_t *first, uint64_t *last, uint64_t count);

/* May the grain share a folio with others in its 2 MiB? */
bool ndm_i_grains_are_wide(const ndm_i_grains *grains, uint64_t grain);

/* Grains of [first, last) may lack blocks: they, and what may share a folio with them, are PARTIAL at best. */
void ndm_i_grains_doubt(ndm_i_grains *grains, uint64_t first, uint64_t last);

/* The file has bytes from before, in folios of any size; those of [offset, offset + size) are a value's. */
void ndm_i_grains_adopt(ndm_i_grains *grains, uint64_t offset, uint64_t size);
void ndm_i_grains_adopt_rest(ndm_i_grains *grains, uint64_t capacity); /* the others are no value's */

/* Is every grain of [offset, end) READY? Each write of a small value asks. */
static inline bool ndm_i_grains_are_ready(const ndm_i_grains *grains, uint64_t offset, uint64_t end)
{
    uint64_t grain = offset / NDM_I_GRAIN;
    while (grain < ndm_i_grains_end(end) && ndm_i_grain_state(grains, grain) == NDM_I_READY)
        grain++;
    return grain >= ndm_i_grains_end(end);
}

/* Has a grain of [offset, end) this state? */
bool ndm_i_grains_have(const ndm_i_grains *grains, uint64_t offset, uint64_t end, uint8_t state);

/* How many states or marks are none; how many grains past `capacity` are not EMPTY, unmarked and without large values. */
uint64_t ndm_i_grains_check(const ndm_i_grains *grains, uint64_t capacity);

#endif
