/* See move.h. */
#include "region/move.h"

#include "os/status.h"
#include "store/warm.h"

uint64_t ndm_i_movable(ndm_region *region, uint32_t extent, uint64_t budget)
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

/* Small values are stored to whole grains in RAM. What lies in [to, vacant) need not be read. */
static void warm(ndm_region *region, uint64_t to, uint64_t size, uint64_t vacant)
{
    for (uint64_t grain = to / NDM_I_GRAIN; size < NDM_I_NO_NEIGHBOUR && grain < ndm_i_grains_end(to + size); grain++) {
        const uint64_t start = grain * NDM_I_GRAIN, end = start + NDM_I_GRAIN;
        if (ndm_i_store_is_cold(&region->store, start) && (start < to || end > vacant))
            ndm_i_store_warm(&region->store, start, true);
    }
}

/* Copy a value's bytes to their new place, the start of a hole; readers know. NDM_ERR_STALE: a reader has just leased the
 * value. */
static int move_bytes(ndm_region *region, uint32_t slot, uint64_t from, uint32_t hole, uint64_t size)
{
    const uint64_t to = ndm_i_bytes(region, ndm_i_extents_offset(&region->extents, hole));
    const uint64_t vacant = to + ndm_i_bytes(region, ndm_i_extents_length(&region->extents, hole));
    ndm_i_header *header = ndm_i_slots_header(&region->slots);
    const uint32_t generation = ndm_i_record_generation(ndm_i_slots_record(&region->slots, slot));
    warm(region, to, size, vacant); /* before readers have to wait */
    ndm_i_slots_move_begin(&region->slots, slot, to);
    int status = ndm_i_leases_has(&region->leases, slot, generation)
                     ? ndm_i_fail(NDM_ERR_STALE, "the value is leased")
                     : ndm_i_store_move(&region->store, from, to, size, vacant, &header->moved);
    if (status != NDM_OK)
        ndm_i_slots_move_cancel(&region->slots, slot);
    return status;
}

int ndm_i_relocate(ndm_region *region, uint32_t extent, ndm_i_place place, uint64_t size)
{
    ndm_i_extents *extents = &region->extents;
    const uint32_t slot = ndm_i_extents_tag(extents, extent);
    const uint64_t from = ndm_i_bytes(region, ndm_i_extents_offset(extents, extent));
    if (!ndm_i_extents_reserve(extents))
        return ndm_i_fail(NDM_ERR_MEMORY, "no memory for an extent");
    int status = move_bytes(region, slot, from, place.hole, size);
    if (status != NDM_OK)
        return status;
    ndm_i_value_moved(region, extent, place);
    return NDM_OK;
}

int ndm_i_slide(ndm_region *region, uint32_t *hole, uint64_t size)
{
    ndm_i_extents *extents = &region->extents;
    const uint32_t extent = ndm_i_extents_next(extents, *hole);
    const uint64_t from = ndm_i_bytes(region, ndm_i_extents_offset(extents, extent));
    const uint32_t slot = ndm_i_extents_tag(extents, extent);
    int status = move_bytes(region, slot, from, *hole, size);
    if (status != NDM_OK)
        return status;
    *hole = ndm_i_value_slid(region, *hole);
    return NDM_OK;
}
