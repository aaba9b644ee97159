/* Compaction: free space is gathered by moving values. */
#include "region/trim.h"

#include "os/status.h"

#define WASTE_SHARE 100 /* compaction is done when the holes are under 1/100 of the live bytes */

/* Size of the value in a used extent if it may be moved, 0 if not; as far as leases have been noted. */
static uint64_t movable(ndm_region *region, uint32_t extent, uint64_t budget)
{
    const uint32_t slot = ndm_i_extents_tag(&region->extents, extent);
    if (slot == NDM_I_NONE || ndm_i_pins_pinned(&region->home, extent))
        return 0;
    const ndm_i_record *record = ndm_i_slots_record(&region->slots, slot);
    if (ndm_i_leases_noted(&region->leases, slot, ndm_i_record_generation(record)))
        return 0;
    const uint64_t size = ndm_i_record_size(record);
    return size <= budget ? size : 0;
}

/* Copy a value's bytes to their new place; readers know. NDM_ERR_STALE: a reader has just leased the value. */
static int move_bytes(ndm_region *region, uint32_t slot, uint64_t from, uint64_t to, uint64_t size)
{
    ndm_i_header *header = ndm_i_slots_header(&region->slots);
    const uint32_t generation = ndm_i_record_generation(ndm_i_slots_record(&region->slots, slot));
    ndm_i_slots_move_begin(&region->slots, slot, to);
    int status = ndm_i_leases_has(&region->leases, slot, generation)
                     ? ndm_i_fail(NDM_ERR_STALE, "the value is leased")
                     : ndm_i_store_move(&region->store, from, to, size, &header->moved);
    if (status != NDM_OK)
        ndm_i_slots_move_cancel(&region->slots, slot);
    return status;
}

/* Move a value into a hole that find() gave. */
static int relocate(ndm_region *region, uint32_t extent, ndm_i_place place, uint64_t size)
{
    ndm_i_extents *extents = &region->extents;
    const uint32_t slot = ndm_i_extents_tag(extents, extent);
    const uint64_t from = ndm_i_bytes(region, ndm_i_extents_offset(extents, extent));
    const uint64_t to = ndm_i_bytes(region, place.offset);
    if (!ndm_i_extents_reserve(extents))
        return ndm_i_fail(NDM_ERR_MEMORY, "no memory for an extent");
    int status = move_bytes(region, slot, from, to, size);
    if (status != NDM_OK)
        return status;
    ndm_i_value_moved(region, extent, place);
    return NDM_OK;
}

/* Move the value behind a hole to the hole's start; the hole is behind it then. */
static int slide(ndm_region *region, uint32_t *hole, uint64_t size)
{
    ndm_i_extents *extents = &region->extents;
    const uint32_t extent = ndm_i_extents_next(extents, *hole);
    const uint64_t from = ndm_i_bytes(region, ndm_i_extents_offset(extents, extent));
    const uint64_t to = ndm_i_bytes(region, ndm_i_extents_offset(extents, *hole));
    const uint32_t slot = ndm_i_extents_tag(extents, extent);
    int status = move_bytes(region, slot, from, to, size);
    if (status != NDM_OK)
        return status;
    *hole = ndm_i_value_slid(region, *hole);
    return NDM_OK;
}

/* The next hole at or after `extent` whose follower may move. */
static uint32_t next_hole(ndm_region *region, uint32_t extent, uint64_t budget, uint64_t *size)
{
    const ndm_i_extents *extents = &region->extents;
    while (extent != NDM_I_NONE) {
        const uint32_t next = ndm_i_extents_next(extents, extent);
        if (next != NDM_I_NONE && ndm_i_extents_is_free(extents, extent) && (*size = movable(region, next, budget)) &&
            (region->data.keeps_blocks || *size <= ndm_i_bytes(region, ndm_i_extents_length(extents, extent))))
            break; /* overlapping moves are for file systems where a write to a block that is there cannot fail */
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
    return (reserve_state){.longest = ndm_i_extents_find(extents, length).hole,
                           .length = length,
                           .reserve = units < extents->mark ? ndm_i_min(units, extents->mark / WASTE_SHARE) : 0};
}

/* May this value move, and is there a hole for it? The one that fits best. */
static bool has_place(ndm_region *region, uint32_t extent, uint64_t budget, uint64_t *size, ndm_i_place *place)
{
    if (extent == NDM_I_NONE || (*size = movable(region, extent, budget)) == 0)
        return false;
    *place = ndm_i_extents_find(&region->extents, ndm_i_extents_length(&region->extents, extent));
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
        status = relocate(region, extent, place, size);
        return status == NDM_OK ? (int64_t)size : status;
    }
    const bool grow = at.length <= at.reserve && movable(region, ndm_i_extents_next(extents, at.longest), budget) > 0;
    uint32_t from = grow ? at.longest : *hole != NDM_I_NONE ? *hole : ndm_i_extents_first_hole(extents);
    *hole = NDM_I_NONE;
    from = next_hole(region, from, budget, &size);
    if (from == NDM_I_NONE || (*stopped = size > left))
        return 0;
    status = slide(region, &from, size);
    if (!grow && ndm_i_extents_next(extents, from) != NDM_I_NONE) /* else trimming will take it */
        *hole = from;
    return status == NDM_OK ? (int64_t)size : status;
}

int ndm_region_compact(ndm_region *region, uint64_t budget, ndm_compaction *out)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    ndm_i_settle(region);
    ndm_i_leases_look_round(&region->leases);
    uint64_t left = budget;
    int64_t moved = 1;
    uint32_t hole = NDM_I_NONE;
    bool stopped = false;
    while (budget > 0 && !stopped && moved != 0) {
        moved = compact_step(region, budget, left, &hole, &stopped);
        if (moved == NDM_ERR_STALE)
            continue; /* the lease has been noted: the next step sees it */
        if (moved < 0)
            break;
        left -= (uint64_t)moved;
        region->moved_bytes += (uint64_t)moved;
    }
    ndm_i_publish(region); /* also of a compaction that was cut short */
    if (moved < 0 && moved != NDM_ERR_STALE)
        return (int)moved;
    *out = (ndm_compaction){.moved_bytes = budget - left,
                            .remaining_bytes = stopped ? ndm_i_bytes(region, region->extents.free_units) : 0};
    return NDM_OK;
}
