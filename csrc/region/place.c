/* See place.h. */
#include "region/place.h"

/* A grain takes 0.53 ms to read, a page 0.07. */
enum { LEAST = 8 };

/* Rather than have another grain read, a value takes the start of a hole that is near, and so many times as long. */
enum { LONGER = 16 };

static uint64_t start_of(const ndm_region *region, uint32_t extent)
{
    return ndm_i_bytes(region, ndm_i_extents_offset(&region->extents, extent));
}

bool ndm_i_place_gather(ndm_region *region, uint32_t hole, uint64_t units, uint64_t least, uint32_t *after)
{
    ndm_i_extents *extents = &region->extents;
    const uint64_t offset = start_of(region, hole), start = offset / NDM_I_GRAIN * NDM_I_GRAIN, end = start + NDM_I_GRAIN;
    uint32_t first = hole, before, e;
    while ((before = ndm_i_extents_previous(extents, first)) != NDM_I_NONE && start_of(region, before) >= start)
        first = before;
    uint64_t fit = 0;
    for (e = first; e != NDM_I_NONE && fit < least && start_of(region, e) < end; e = ndm_i_extents_next(extents, e))
        if (ndm_i_extents_is_free(extents, e))
            fit += ndm_i_extents_length(extents, e) / units;
    if (!ndm_i_store_warm(&region->store, offset, fit >= least) || fit < least)
        return false;
    for (e = first; e != NDM_I_NONE && start_of(region, e) < end; e = ndm_i_extents_next(extents, e))
        if (ndm_i_extents_is_free(extents, e))
            ndm_i_extents_prefer(extents, e, true);
    *after = e;
    return true;
}

ndm_i_place ndm_i_place_warm(ndm_region *region, ndm_i_place place, uint64_t units)
{
    const ndm_i_extents *extents = &region->extents;
    uint32_t after;
    if (ndm_i_bytes(region, units) >= NDM_I_NO_NEIGHBOUR || !region->data.keeps_blocks)
        return place;
    /* A near one has become bad meanwhile: any other will do. */
    const uint64_t most = place.near                           ? UINT64_MAX
                          : ndm_i_is_cold_place(region, place) ? LONGER * ndm_i_extents_length(extents, place.hole)
                                                               : 0;
    const ndm_i_place other = ndm_i_extents_find_in(extents, !place.near, units);
    if (other.hole != NDM_I_NONE && ndm_i_extents_length(extents, other.hole) <= most && !ndm_i_is_bad_place(region, other))
        return other;
    place.near = ndm_i_place_gather(region, place.hole, units, LEAST, &after) || place.near;
    return place;
}
