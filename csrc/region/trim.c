/* Space that is no longer needed goes back to the file system. */
#include "region/trim.h"

#include "os/bytes.h"
#include "os/status.h"

#define PUNCH_FROM ((uint64_t)64 << 10) /* a hole costs a system call and, later, blocks again: not for less */

void ndm_i_lower_mark(ndm_region *region)
{
    const ndm_i_extents *extents = &region->extents;
    const uint64_t mark = extents->mark;
    if (ndm_i_extents_trim(&region->extents) == mark)
        return;
    const uint32_t last = ndm_i_extents_last(extents);
    uint64_t end = 0;
    if (last != NDM_I_NONE) {
        const uint32_t slot = ndm_i_extents_tag(extents, last);
        const ndm_i_record *record = slot != NDM_I_NONE ? ndm_i_slots_record(&region->slots, slot) : NULL;
        end = ndm_i_bytes(region, ndm_i_extents_offset(extents, last)) +
              (record ? ndm_i_record_size(record) : ndm_i_bytes(region, ndm_i_extents_length(extents, last)));
    }
    region->used_bytes = ndm_i_min(region->used_bytes, end);
}

/* Punch what is free: the end, and holes between values that are worth it. */
static void punch(ndm_region *region)
{
    const ndm_i_extents *extents = &region->extents;
    const bool stored_to = ndm_i_pins_writable(&region->home);
    const uint64_t used = ndm_i_taken_end(region);
    ndm_i_store_punch(&region->store, used, region->data.capacity - used, stored_to);
    for (uint32_t e = ndm_i_extents_first_hole(&region->extents); e != NDM_I_NONE; e = ndm_i_extents_next(extents, e)) {
        const uint64_t size = ndm_i_bytes(region, ndm_i_extents_length(extents, e));
        if (size >= PUNCH_FROM && ndm_i_extents_is_free(extents, e))
            ndm_i_store_punch(&region->store, ndm_i_bytes(region, ndm_i_extents_offset(extents, e)), size, stored_to);
    }
}

/* Cutting pages off under a reader's view would be SIGBUS: with readers the end becomes a hole instead. Where a view of a hole
 * may be SIGBUS, too, all stays as it is while there are readers. */
static void give_back(ndm_region *region)
{
    const uint64_t capacity = ndm_i_max(ndm_i_taken_end(region), region->initial_capacity);
    const bool shrinks = capacity < region->data.capacity, wants_none = region->data.holes_need_room;
    const bool alone = (shrinks || wants_none) && ndm_i_slots_bar_readers(&region->slots);
    if (shrinks && alone)
        ndm_i_store_shrink(&region->store, capacity);
    if (alone && !wants_none)
        ndm_i_slots_let_readers(&region->slots);
    if (alone || !wants_none)
        punch(region);
    if (alone && wants_none)
        ndm_i_slots_let_readers(&region->slots);
}

int64_t ndm_region_trim(ndm_region *region)
{
    uint64_t before, after;
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    if ((status = ndm_i_file_disk_bytes(&region->data, &before)) != NDM_OK)
        return status;

    ndm_i_settle(region);
    ndm_i_lower_mark(region);
    give_back(region);
    ndm_i_publish(region);
    if ((status = ndm_i_file_disk_bytes(&region->data, &after)) != NDM_OK)
        return status;
    return before > after ? (int64_t)(before - after) : 0;
}
