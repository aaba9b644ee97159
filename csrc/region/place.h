/* Where a value goes: the best-fitting hole, and a hole beside others where the best is not in RAM.
 *
 * A small value that is stored into a page which is not in RAM waits for the disk to read that page. So where the best hole
 * lies in a cold grain, the grain is read as a whole, and all its holes are brought near: they are used before others of
 * their size, until they are used up.
 */
#ifndef NDM_PLACE_H
#define NDM_PLACE_H

#include "region/ledger.h"
#include "store/warm.h"

static inline bool ndm_i_is_cold_place(const ndm_region *region, ndm_i_place place)
{
    return place.hole != NDM_I_NONE && ndm_i_store_is_cold(&region->store, ndm_i_bytes(region, place.offset));
}

/* A place as good as this one, which is cold, for `units`: the same in a grain that is in RAM by now, or another. */
ndm_i_place ndm_i_place_warm(ndm_region *region, ndm_i_place place, uint64_t units);

/* The place for the next value of `units`. */
static inline ndm_i_place ndm_i_place_find(ndm_region *region, uint64_t units)
{
    const ndm_i_place place = ndm_i_extents_find(&region->extents, units);
    return ndm_i_is_cold_place(region, place) ? ndm_i_place_warm(region, place, units) : place;
}

/* Read the grain of a hole, if it is cold, and bring all its holes near. false, and nothing is done, if the holes there are
 * too few for that: they hold less than `least` values of `units`. Gives the first extent past the grain in `*after`. */
bool ndm_i_place_gather(ndm_region *region, uint32_t hole, uint64_t units, uint64_t least, uint32_t *after);

#endif
