/* The region as its verbs see it (region.c, space.c). */
#ifndef NDM_REGION_H
#define NDM_REGION_H

#include "backing.h"
#include "extents.h"
#include "grains.h"
#include "nodedb_mem.h"
#include "owner.h"
#include "slots.h"
#include "views.h"

struct ndm_region {
    ndm_i_owner owner;    /* .thread is 0 once closed: no thread has that number */
    ndm_i_extents extents;
    ndm_i_slots slots;
    ndm_i_backing data;
    ndm_i_grains grains;
    ndm_i_home home;
    uint64_t initial_capacity; /* trim() shrinks the file no further */
    uint64_t max_capacity;
    uint64_t used_bytes;
    uint64_t live_bytes;
    uint64_t pinned_bytes; /* in extents that are freed and wait for a view */
    uint64_t growths;
    uint64_t moved_bytes;  /* by compact() */
    uint64_t engine_bytes[256]; /* live, by engine */
    uint64_t engine_slots[256];
    unsigned unit_shift;   /* one unit of the extents is 1 << unit_shift bytes: the alignment */
    _Atomic unsigned holders; /* of this struct: the handle, and the file until it is closed */
};

/* Every verb begins here: is it the owner's call? Freed extents whose views have ended come home on the way. */
int ndm_i_enter(ndm_region *region);

/* The record of a live slot; NULL, with the error set, if there is none. */
ndm_i_record *ndm_i_live_record(const ndm_region *region, int64_t slot);

static inline uint64_t ndm_i_units(const ndm_region *region, uint64_t bytes)
{
    return (bytes + ((uint64_t)1 << region->unit_shift) - 1) >> region->unit_shift;
}

#endif
