/* Space that is no longer needed goes back to the file system. */
#include "region/trim.h"

#include "os/bytes.h"
#include "os/status.h"

#define PUNCH_FROM ((uint64_t)64 << 10) /* a hole costs a system call and, later, blocks again: not for less */
#define IDLE_ROUNDS 8 /* of a call with a budget that gives nothing back, because it meets holes only */

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

/* Punch a free range in pieces of what is left of the budget. What there is to do counts, and what little it gives back does
 * not. Returns how far the budget went. */
static uint64_t punch_range(ndm_region *region, uint64_t start, uint64_t end, bool stored_to, uint64_t *budget)
{
    while (start < end && *budget > 0) {
        const uint64_t piece = ndm_i_max(*budget, NDM_I_HUGE); /* less of a large folio is not given back */
        const uint64_t next = end - start <= piece ? end : ndm_i_min(ndm_i_round_up(start + piece, NDM_I_HUGE), end);
        if (ndm_i_store_punch(&region->store, start, next - start, stored_to))
            *budget -= ndm_i_min(*budget, ndm_i_max(next - start, NDM_I_GRAIN)); /* a small hole takes as long */
        start = next;
    }
    return start;
}

/* Punch what is free: holes between values that are worth it, and the end, from where the last call stopped. */
static void punch(ndm_region *region, uint64_t *budget)
{
    const ndm_i_extents *extents = &region->extents;
    const bool stored_to = ndm_i_pins_writable(&region->home);
    const uint64_t from = region->trimmed_to, capacity = region->data.capacity;
    uint64_t at = 0;
    for (uint32_t e = ndm_i_extents_first_hole(&region->extents); e != NDM_I_NONE; e = ndm_i_extents_next(extents, e)) {
        const uint64_t start = ndm_i_bytes(region, ndm_i_extents_offset(extents, e));
        const uint64_t size = ndm_i_bytes(region, ndm_i_extents_length(extents, e));
        if (size < PUNCH_FROM || start + size <= from || !ndm_i_extents_is_free(extents, e))
            continue;
        at = punch_range(region, ndm_i_max(start, from), start + size, stored_to, budget);
        if (*budget == 0)
            break;
    }
    if (*budget > 0)
        at = punch_range(region, ndm_i_max(ndm_i_taken_end(region), from), capacity, stored_to, budget);
    region->trimmed_to = at < capacity ? at : 0;
}

/* Cutting pages off under a reader's view would be SIGBUS: with readers the end becomes a hole instead. Where a view of a hole
 * may be SIGBUS, too, all stays as it is while there are readers. */
static void give_back(ndm_region *region, uint64_t *budget)
{
    const uint64_t now = region->data.capacity, least = ndm_i_max(ndm_i_taken_end(region), region->initial_capacity);
    const uint64_t blocks = ndm_i_max(least, ndm_i_min(now, region->store.allocated)); /* none beyond */
    const uint64_t capacity = blocks - least > *budget ? blocks - *budget : least;
    const bool shrinks = capacity < now, wants_none = region->data.holes_need_room;
    const bool alone = (shrinks || wants_none) && ndm_i_slots_bar_readers(&region->slots);
    if (shrinks && alone)
        ndm_i_store_shrink(&region->store, capacity);
    if (alone && !wants_none)
        ndm_i_slots_let_readers(&region->slots);
    if (region->data.capacity < blocks)
        *budget -= blocks - region->data.capacity;
    if (alone || !wants_none)
        punch(region, budget);
    if (alone && wants_none)
        ndm_i_slots_let_readers(&region->slots);
}

int64_t ndm_region_trim_some(ndm_region *region, uint64_t budget)
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
    if (budget == UINT64_MAX)
        region->trimmed_to = 0;
    unsigned rounds = IDLE_ROUNDS;
    do {
        uint64_t left = budget;
        give_back(region, &left);
        if ((status = ndm_i_file_disk_bytes(&region->data, &after)) != NDM_OK)
            break;
    } while (after >= before && region->trimmed_to > 0 && --rounds > 0);
    ndm_i_publish(region);
    if (status != NDM_OK)
        return status;
    return before > after ? (int64_t)(before - after) : 0;
}

int64_t ndm_region_trim(ndm_region *region) { return ndm_region_trim_some(region, UINT64_MAX); }
