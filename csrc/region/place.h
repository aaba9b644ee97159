/* Where a value goes: the best-fitting hole, and a hole beside others where a store to the best would wait.
 *
 * A small value that is stored into a page which is not in RAM waits for the disk to read that page, and one that is stored
 * into a page which has been written back waits for the file system. So where the best hole lies in such a grain, the grain
 * is read or mapped as a whole, and all its holes are brought near: they are used before others of their size, until they
 * are used up. The next values go there, too, and no other grain has to be read, mapped, and written back for them.
 */
#ifndef NDM_PLACE_H
#define NDM_PLACE_H

#include "region/ledger.h"
#include "store/warm.h"

static inline bool ndm_i_is_cold_place(const ndm_region *region, ndm_i_place place)
{
    return place.hole != NDM_I_NONE && ndm_i_store_is_cold(&region->store, ndm_i_bytes(region, place.offset));
}

/* Would stores to it wait for the disk, or fault page by page? */
static inline bool ndm_i_is_bad_place(const ndm_region *region, ndm_i_place place)
{
    const uint64_t offset = ndm_i_bytes(region, place.offset);
    return place.hole != NDM_I_NONE && (ndm_i_store_is_cold(&region->store, offset) || ndm_i_is_stale(&region->store, offset));
}

/* A place as good as this one, which is bad, for `units`: the same in a grain that is warm by now, or another. */
ndm_i_place ndm_i_place_warm(ndm_region *region, ndm_i_place place, uint64_t units);

/* The place for the next value of `units`. */
static inline ndm_i_place ndm_i_place_find(ndm_region *region, uint64_t units)
{
    const ndm_i_place place = ndm_i_extents_find(&region->extents, units);
    return ndm_i_is_bad_place(region, place) ? ndm_i_place_warm(region, place, units) : place;
}

/* Warm the grain of a hole, and bring all its holes near. false, and nothing is read or brought near, if the holes there are
 * too few for that: they hold less than `least` values of `units`. Gives the first extent past the grain in `*after`. */
bool ndm_i_place_gather(ndm_region *region, uint32_t hole, uint64_t units, uint64_t least, uint32_t *after);

#endif
