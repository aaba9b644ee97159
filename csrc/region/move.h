/* Moving one value, for compaction and for whoever gathers room. Readers find it at the old place or at the new one. */
#ifndef NDM_MOVE_H
#define NDM_MOVE_H

#include "region/ledger.h"

/* Size of the value in a used extent if it may be moved, 0 if not: larger than `most`, viewed, leased or in limbo. */
uint64_t ndm_i_movable(ndm_region *region, uint32_t extent, uint64_t most);

/* May a value move by less than its size, into a hole in front of it? Overlapping moves are for file systems where a write
 * to a block that is there cannot fail. */
static inline bool ndm_i_may_slide(const ndm_region *region, uint64_t size, uint64_t hole)
{
    return region->data.keeps_blocks || size <= hole;
}

/* Both give a status; then the value is where it was. NDM_ERR_STALE: a reader has leased it just now. */

/* Move a value into the hole of a place. */
int ndm_i_relocate(ndm_region *region, uint32_t extent, ndm_i_place place, uint64_t size);

/* Move the value behind a hole to the hole's start; the hole is behind it then. */
int ndm_i_slide(ndm_region *region, uint32_t *hole, uint64_t size);

#endif
