/* Compaction: free space is gathered by moving values. */
#include "region/trim.h"

#include "os/status.h"
#include "region/move.h"
#include "region/place.h"

#define WASTE_SHARE 100 /* compaction is done when the holes are under 1/100 of the live bytes */

/* A call with a budget is over when it has read that much for it from disk: 512 KiB take 0.53 ms. */
#define FETCH_LEAST ((uint64_t)2 << 20)
#define FETCH_SHARE 6

/* The next hole at or after `extent` whose follower may move. */
static uint32_t next_hole(ndm_region *region, uint32_t extent, uint64_t budget, uint64_t *size)
{
    const ndm_i_extents *extents = &region->extents;
    while (extent != NDM_I_NONE) {
        const uint32_t next = ndm_i_extents_next(extents, extent);
        if (next != NDM_I_NONE && ndm_i_extents_is_free(extents, extent) && (*size = ndm_i_movable(region, next, budget)) &&
            ndm_i_may_slide(region, *size, ndm_i_bytes(region, ndm_i_extents_length(extents, extent))))
            break;
        extent = next;
    }
    return extent;
}

/* One compaction call: the hole it grows, and how far it lets that grow. All in units. */
typedef struct {
    uint32_t longest; /* the longest hole */
    uint64_t length;
    uint64_t reserve; /* room for the values to come: as many bytes as the budget, 0 if that is for everything */
} reserve_state;

static reserve_state look_around(const ndm_region *region, uint64_t budget)
{
    const ndm_i_extents *extents = &region->extents;
    const uint64_t length = ndm_i_extents_largest(extents);
    const uint64_t units = budget >> region->unit_shift;
    return (reserve_state){.longest = ndm_i_extents_longest(extents),
                           .length = length,
                           .reserve = units < extents->mark ? ndm_i_min(units, extents->mark / WASTE_SHARE) : 0};
}

/* The pass through the file: the next grain that has holes is read, and they are brought near. false: there was none left,
 * and the next pass begins at the start of the file. */
static bool sweep(ndm_region *region)
{
    ndm_i_extents *extents = &region->extents;
    uint32_t at = extents->cursor == NDM_I_NONE ? ndm_i_extents_first_hole(extents) : extents->cursor;
    while (at != NDM_I_NONE && !ndm_i_extents_is_free(extents, at))
        at = ndm_i_extents_next(extents, at);
    const bool gathered = at != NDM_I_NONE && ndm_i_place_gather(region, at, 1, 1, &at);
    extents->cursor = at == NDM_I_NONE || gathered ? at : ndm_i_extents_next(extents, at);
    return gathered;
}

/* A hole for the last value, or for one beside the longest hole. In a `whole` compaction, and where the best is not in RAM,
 * it is one that the pass has come to; else the best. */
static ndm_i_place find_place(ndm_region *region, uint64_t units, bool whole)
{
    ndm_i_extents *extents = &region->extents;
    const ndm_i_place best = ndm_i_extents_find(extents, units);
    if (best.hole == NDM_I_NONE || (!whole && !ndm_i_is_cold_place(region, best)))
        return best;
    do {
        ndm_i_place near = ndm_i_extents_find_in(extents, true, units);
        while (near.hole != NDM_I_NONE && ndm_i_is_cold_place(region, near)) { /* dropped since it was read */
            ndm_i_extents_prefer(extents, near.hole, false);
            near = ndm_i_extents_find_in(extents, true, units);
        }
        if (near.hole != NDM_I_NONE)
            return near;
    } while (ndm_i_extents_find_in(extents, false, units).hole != NDM_I_NONE && sweep(region));
    return ndm_i_place_find(region, units);
}

/* May this value move, and is there a hole for it? */
static bool has_place(ndm_region *region, uint32_t extent, uint64_t budget, uint64_t *size, ndm_i_place *place)
{
    if (extent == NDM_I_NONE || (*size = ndm_i_movable(region, extent, budget)) == 0)
        return false;
    *place = find_place(region, ndm_i_extents_length(&region->extents, extent), budget == UINT64_MAX);
    return place->hole != NDM_I_NONE;
}

/* A value worth moving into a hole: the last one, or a neighbour of the longest hole if it fits into a hole that is
 * not the longest and not its other neighbour. NDM_I_NONE if there is none. */
static uint32_t choose(ndm_region *region, uint64_t budget, const reserve_state *at, uint64_t *size,
                       ndm_i_place *place)
{
    const ndm_i_extents *extents = &region->extents;
    const uint32_t last = ndm_i_extents_last(extents);
    if (has_place(region, last, budget, size, place) && (place->hole != at->longest || at->length > at->reserve ||
                                                         at->length == ndm_i_extents_length(extents, last)))
        return last;
    if (at->reserve == 0)
        return NDM_I_NONE;
    const uint32_t next = ndm_i_extents_next(extents, at->longest);
    if (has_place(region, next, budget, size, place) && place->hole != at->longest &&
        place->hole != ndm_i_extents_next(extents, next))
        return next;
    const uint32_t previous = ndm_i_extents_previous(extents, at->longest);
    if (has_place(region, previous, budget, size, place) && place->hole != at->longest &&
        place->hole != ndm_i_extents_previous(extents, previous))
        return previous;
    return NDM_I_NONE;
}

/* One move. `*hole` is where pushing goes on. Gives the bytes moved; 0 when there is nothing to do, or when the next
 * value is larger than `left` (*stopped).
 *
 * To move a value into a hole that fits it frees a byte of its old place for each byte moved; to push a hole up past
 * its follower frees nothing until the hole meets another. So the last value goes into its best-fitting hole, which
 * lowers the mark. Where it fits none, the neighbours of the longest hole go into other holes, so that small holes
 * become one that longer values fit into. That hole is left to the values to come until it is longer than the
 * reserve, unless the last value fits it exactly: filling it from the end would cost the budget that opened it a second
 * time. Pushing is the last resort.
 *
 * It ends: with each move the mark falls; or the sum of the squares of the holes' lengths grows, for the longest hole
 * gains what a shorter one loses; or a hole goes up, and nothing else changes. */
static int64_t compact_step(ndm_region *region, uint64_t budget, uint64_t left, uint32_t *hole, bool *stopped)
{
    ndm_i_extents *extents = &region->extents;
    ndm_i_lower_mark(region);
    if (ndm_i_bytes(region, extents->free_units) <= region->live_bytes / WASTE_SHARE)
        return 0;
    int status;
    uint64_t size;
    ndm_i_place place;
    const reserve_state at = look_around(region, budget);
    const uint32_t extent = choose(region, budget, &at, &size, &place);
    if (extent != NDM_I_NONE) {
        if ((*stopped = size > left))
            return 0;
        *hole = NDM_I_NONE; /* it may be the one that is filled, or the one that trimming takes */
        status = ndm_i_relocate(region, extent, place, size);
        return status == NDM_OK ? (int64_t)size : status;
    }
    const bool grow = at.length <= at.reserve && ndm_i_movable(region, ndm_i_extents_next(extents, at.longest), budget) > 0;
    uint32_t from = grow ? at.longest : *hole != NDM_I_NONE ? *hole : ndm_i_extents_first_hole(extents);
    *hole = NDM_I_NONE;
    from = next_hole(region, from, budget, &size);
    if (from == NDM_I_NONE || (*stopped = size > left))
        return 0;
    status = ndm_i_slide(region, &from, size);
    if (!grow && ndm_i_extents_next(extents, from) != NDM_I_NONE) /* else trimming will take it */
        *hole = from;
    return status == NDM_OK ? (int64_t)size : status;
}

int ndm_region_compact(ndm_region *region, uint64_t budget, ndm_compaction *out)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    const ndm_error before = *ndm_last_error();
    ndm_i_settle(region);
    ndm_i_leases_look_round(&region->leases);
    region->store.asked = 0;
    uint64_t left = budget;
    const uint64_t enough = budget < UINT64_MAX / 8 ? FETCH_LEAST + FETCH_SHARE * budget : UINT64_MAX;
    const uint64_t fetched = region->store.fetched;
    int64_t moved = 1;
    uint32_t hole = NDM_I_NONE;
    bool stopped = false;
    while (budget > 0 && !stopped && moved != 0) {
        moved = compact_step(region, budget, left, &hole, &stopped);
        if (moved == NDM_ERR_STALE)
            continue; /* the lease has been noted: the next step sees it */
        if (moved < 0)
            break;
        stopped = stopped || region->store.fetched - fetched >= enough;
        left -= (uint64_t)moved;
        region->moved_bytes += (uint64_t)moved;
    }
    ndm_i_publish(region); /* also of a compaction that was cut short */
    if (moved < 0 && moved != NDM_ERR_STALE)
        return (int)moved;
    *out = (ndm_compaction){.moved_bytes = budget - left,
                            .remaining_bytes = stopped ? ndm_i_bytes(region, region->extents.free_units) : 0};
    return (int)ndm_i_ended(NDM_OK, &before); /* a value that was leased meanwhile is no failure */
}
