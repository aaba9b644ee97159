/* What a region shows of itself: figures, slots, and the checker of all its books. */
#include "region/ledger.h"

#include "os/bytes.h"
#include "os/residency.h"
#include "os/status.h"
#include "store/extents_check.h"

#include <stdlib.h>
#include <string.h>

int ndm_region_slot(ndm_region *region, int64_t slot, ndm_slot *out)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    const ndm_i_record *record = ndm_i_slots_record(&region->slots, slot);
    if (!record)
        return ndm_i_fail(NDM_ERR_NO_SLOT, "the slot never existed");
    *out = (ndm_slot){.offset = ndm_i_record_offset(record),
                      .size = ndm_i_record_size(record),
                      .generation = ndm_i_record_generation(record),
                      .engine = ndm_i_record_engine(record),
                      .occupied = ndm_i_record_is_live(record)};
    return NDM_OK;
}

int ndm_region_contains(ndm_region *region, int64_t slot)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    const ndm_i_record *record = ndm_i_slots_record(&region->slots, slot);
    return record && ndm_i_record_is_live(record);
}

int ndm_region_stats(ndm_region *region, ndm_stats *out)
{
    int status = ndm_i_enter_to_look(region);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    if (ndm_i_limbo_is_unsettled(&region->limbo))
        ndm_i_settle(region);
    uint64_t disk_bytes, resident, unwritten;
    if ((status = ndm_i_file_disk_bytes(&region->data, &disk_bytes)) != NDM_OK ||
        (status = ndm_i_residency(&region->data, &resident, &unwritten)) != NDM_OK)
        return status;
    uint64_t largest;
    const uint64_t free_bytes = ndm_i_free_bytes(region, &largest);
    *out = (ndm_stats){.capacity = region->data.capacity,
                       .max_capacity = region->max_capacity,
                       .used_bytes = region->used_bytes,
                       .live_bytes = region->live_bytes,
                       .free_bytes = free_bytes,
                       .pinned_bytes = ndm_i_bytes(region, region->limbo.units),
                       .largest_free_bytes = largest,
                       .slot_count = region->slots.count,
                       .live_slots = region->slots.live,
                       .growths = region->growths,
                       .moved_bytes = region->moved_bytes,
                       .disk_bytes = disk_bytes,
                       .alignment = (uint64_t)1 << region->unit_shift,
                       .can_punch = region->data.can_punch,
                       .resident_bytes = resident,
                       .unwritten_bytes = unwritten};
    ndm_i_writer_lock(&region->store.writer);
    out->written_back_bytes = region->store.writer.written_back;
    ndm_i_writer_unlock(&region->store.writer);
    memcpy(out->engine_bytes, region->engine_bytes, sizeof out->engine_bytes);
    memcpy(out->engine_slots, region->engine_slots, sizeof out->engine_slots);
    return NDM_OK;
}

int ndm_region_info(ndm_region *region, ndm_info *out)
{
    const int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    if (ndm_i_limbo_is_unsettled(&region->limbo))
        ndm_i_settle(region); /* for readers, who see what is published */
    *out = (ndm_info){.capacity = region->data.capacity,
                      .max_capacity = region->max_capacity,
                      .used_bytes = region->used_bytes,
                      .live_bytes = region->live_bytes,
                      .slot_count = region->slots.count,
                      .live_slots = region->slots.live,
                      .alignment = (uint64_t)1 << region->unit_shift};
    return NDM_OK;
}

/* ---- checking ------------------------------------------------------------------------------------------- */

/* Every used extent is a live slot's, or in limbo; gives how many are neither, and sums both kinds up. */
static uint64_t check_extents(ndm_region *region, uint64_t *slots, uint64_t *limbo_units)
{
    const ndm_i_extents *extents = &region->extents;
    uint64_t broken = 0;
    for (uint32_t e = ndm_i_extents_first(extents); e != NDM_I_NONE; e = ndm_i_extents_next(extents, e)) {
        if (ndm_i_extents_is_free(extents, e))
            continue;
        const uint64_t length = ndm_i_extents_length(extents, e);
        const uint32_t tag = ndm_i_extents_tag(extents, e);
        if (tag == NDM_I_NONE) {
            *limbo_units += length;
            continue;
        }
        const ndm_i_record *record = ndm_i_slots_record(&region->slots, tag);
        *slots += 1;
        broken += !record || !ndm_i_record_is_live(record) || ndm_i_record_link(record) != e ||
                  ndm_i_record_offset(record) != ndm_i_extents_offset(extents, e) << region->unit_shift ||
                  ndm_i_units(region, ndm_i_record_size(record)) != length;
    }
    return broken;
}

/* Does every value, and every extent in limbo, lie in grains that may hold one? */
static uint64_t check_grains(const ndm_region *region)
{
    const ndm_i_extents *extents = &region->extents;
    uint64_t broken = 0;
    for (uint32_t e = ndm_i_extents_first(extents); e != NDM_I_NONE; e = ndm_i_extents_next(extents, e)) {
        if (ndm_i_extents_is_free(extents, e))
            continue;
        const uint64_t start = ndm_i_bytes(region, ndm_i_extents_offset(extents, e));
        const ndm_i_record *record = ndm_i_slots_record(&region->slots, ndm_i_extents_tag(extents, e));
        if (!record && region->gate.outside > 0) /* of a value that is still to be written */
            continue;
        const uint64_t size = record ? ndm_i_record_size(record) : 1; /* of one in limbo the last unit may be cut off */
        broken += ndm_i_grains_have(&region->store.grains, start, start + size, NDM_I_EMPTY);
        broken += ndm_i_grains_have(&region->store.grains, start, start + size, NDM_I_HOLE);
    }
    return broken;
}

/* Are the large values of each grain those of the books? */
static uint64_t check_large(const ndm_region *region)
{
    const ndm_i_grains *kept = &region->store.grains;
    ndm_i_grains counted = {.large = calloc(kept->room + 1, 1), .room = kept->room};
    uint64_t broken = 0;
    if (!counted.large)
        return 0;
    for (uint64_t i = 0; i < region->slots.count; i++) {
        const ndm_i_record *record = ndm_i_slots_record(&region->slots, (int64_t)i);
        if (ndm_i_record_is_live(record))
            ndm_i_grains_count_large(&counted, ndm_i_record_offset(record), ndm_i_record_size(record), 1);
    }
    for (uint64_t grain = 0; grain < kept->room; grain++)
        broken += kept->large[grain] != counted.large[grain];
    broken += kept->large_values != counted.large_values;
    free(counted.large);
    return broken;
}

/* A pinned extent is a live value's; or an orphan, and in limbo. */
static bool is_pin_sound(void *context, uint32_t extent, bool orphan)
{
    const ndm_region *region = context;
    if (!ndm_i_extents_is_used(&region->extents, extent))
        return false;
    /* What a lease keeps is not told apart from a value's extent by its pin until the lease ends. */
    return !orphan || ndm_i_extents_tag(&region->extents, extent) == NDM_I_NONE;
}

/* The figures that are kept, against those that are counted. */
static uint64_t check_figures(const ndm_region *region, uint64_t *empty)
{
    uint64_t broken = 0, live_bytes = 0, furthest = 0, by_engine[256] = {0}, slots_of[256] = {0};
    for (uint64_t i = 0; i < region->slots.count; i++) {
        const ndm_i_record *record = ndm_i_slots_record(&region->slots, (int64_t)i);
        if (!ndm_i_record_is_live(record))
            continue;
        const uint64_t size = ndm_i_record_size(record);
        *empty += size == 0;
        live_bytes += size;
        by_engine[ndm_i_record_engine(record)] += size;
        slots_of[ndm_i_record_engine(record)]++;
        furthest = ndm_i_max(furthest, ndm_i_record_offset(record) + size);
    }
    broken += live_bytes != region->live_bytes;
    broken += memcmp(by_engine, region->engine_bytes, sizeof by_engine) != 0;
    broken += memcmp(slots_of, region->engine_slots, sizeof slots_of) != 0;
    broken += furthest > region->used_bytes;
    broken += region->used_bytes > ndm_i_bytes(region, region->extents.mark);
    broken += region->used_bytes > region->data.capacity ||
              region->data.capacity > ndm_i_max(region->max_capacity, region->initial_capacity);
    return broken;
}

int64_t ndm_region_check(ndm_region *region)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    uint64_t broken = ndm_i_extents_check(&region->extents) + ndm_i_slots_check(&region->slots);
    if (broken > 0) /* the others rest on these */
        return (int64_t)broken;
    uint64_t with_extent = 0, limbo_units = 0, empty = 0;
    broken += check_extents(region, &with_extent, &limbo_units);
    broken += check_figures(region, &empty);
    broken += with_extent + empty != region->slots.live;
    broken += region->gate.outside == 0 && limbo_units != region->limbo.units + region->limbo.waiting_units;
    broken += ndm_i_store_check(&region->store) + check_grains(region) + check_large(region);
    broken += ndm_i_pins_check(&region->home, is_pin_sound, region);
    return (int64_t)broken;
}
