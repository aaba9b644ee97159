/* Many values in one call, all or nothing. */
#include "region/ledger.h"

#include "os/status.h"

#include <stdlib.h>
#include <string.h>

/* ---- writing -------------------------------------------------------------------------------------------- */

/* The values of a batch: `count` pieces, either each with an address of its own or one after the other at `data`. */
typedef struct {
    const void *const *parts; /* NULL: packed */
    const uint64_t *sizes;
    const uint8_t *data;
    const int64_t *lengths;
    uint64_t count;
} values;

static uint64_t size_at(const values *batch, uint64_t i)
{
    return batch->parts ? batch->sizes[i] : (uint64_t)batch->lengths[i];
}

typedef struct {
    uint32_t extent;
    uint64_t vacant;
} taken;

/* The space as it was before a batch. */
typedef struct {
    uint64_t mark, capacity;
} before;

static void give_back(ndm_region *region, const taken *places, uint64_t count, before was)
{
    for (uint64_t i = 0; i < count; i++)
        if (places[i].extent != NDM_I_NONE)
            ndm_i_extents_release(&region->extents, places[i].extent);
    ndm_i_extents_lower(&region->extents, was.mark);
    if (region->data.capacity > was.capacity)
        ndm_i_grains_shrink(&region->grains, was.capacity);
}

/* Take an extent for each value, and make the file reach the furthest. */
static int take_places(ndm_region *region, const values *batch, taken *places, before was)
{
    uint64_t furthest = 0, i;
    int status = NDM_OK;
    for (i = 0; i < batch->count && status == NDM_OK; i++) {
        const uint64_t size = size_at(batch, i);
        places[i].extent = NDM_I_NONE;
        if (size == 0)
            continue;
        if (size >= NDM_I_SIZE_LIMIT / 2 || furthest >= NDM_I_SIZE_LIMIT / 2)
            status = ndm_i_fail_capacity(size, ndm_i_ceiling(region->max_capacity));
        else if (!ndm_i_extents_reserve(&region->extents))
            status = ndm_i_fail(NDM_ERR_MEMORY, "no memory for an extent");
        if (status != NDM_OK)
            break;
        const ndm_i_place place = ndm_i_extents_find(&region->extents, ndm_i_units(region, size));
        const uint64_t end = (place.offset << region->unit_shift) + size;
        furthest = end > furthest ? end : furthest;
        places[i].vacant = ndm_i_vacant(region, place);
        places[i].extent = ndm_i_extents_take(&region->extents, place, ndm_i_units(region, size), NDM_I_NONE);
    }
    if (status == NDM_OK && furthest > region->data.capacity)
        ndm_i_leased_collect(region, true); /* too late for these places; growing is when space is short */
    if (status == NDM_OK)
        status = ndm_i_reach(region, furthest);
    if (status != NDM_OK)
        give_back(region, places, i, was);
    return status;
}

static int store_all(ndm_region *region, const values *batch, const taken *places)
{
    const uint8_t *packed = batch->data;
    for (uint64_t i = 0; i < batch->count; i++) {
        const uint64_t size = size_at(batch, i);
        if (size > 0) {
            const uint64_t offset = ndm_i_extents_offset(&region->extents, places[i].extent) << region->unit_shift;
            const void *source = batch->parts ? batch->parts[i] : packed;
            int status = ndm_i_grains_store(&region->grains, offset, source, size, places[i].vacant);
            if (status != NDM_OK)
                return status;
        }
        if (!batch->parts)
            packed += size;
    }
    return NDM_OK;
}

static int write_batch(ndm_region *region, const values *batch, int64_t engine, int64_t *slots)
{
    int status = ndm_i_check_engine(engine);
    if (status == NDM_OK)
        status = ndm_i_slots_reserve(&region->slots, batch->count);
    if (status != NDM_OK || batch->count == 0)
        return status;
    taken *places = malloc(batch->count * sizeof *places);
    if (!places)
        return ndm_i_fail(NDM_ERR_MEMORY, "no memory for a batch");
    const before was = {region->extents.mark, region->data.capacity};
    status = take_places(region, batch, places, was);
    if (status == NDM_ERR_CAPACITY) /* leases of the dead came home meanwhile */
        status = take_places(region, batch, places, was);
    if (status != NDM_OK)
        goto fail;
    if ((status = store_all(region, batch, places)) != NDM_OK) {
        give_back(region, places, batch->count, was);
        goto fail;
    }
    region->growths += region->data.capacity > was.capacity;
    for (uint64_t i = 0; i < batch->count; i++) {
        const uint32_t extent = places[i].extent;
        const uint64_t offset =
            extent == NDM_I_NONE ? 0 : ndm_i_extents_offset(&region->extents, extent) << region->unit_shift;
        slots[i] = ndm_i_enter_value(region, offset, size_at(batch, i), extent, (uint8_t)engine,
                                     NDM_I_LIVE);
    }

fail:
    free(places);
    return status;
}

int ndm_region_write_many(ndm_region *region, const void *const *parts, const uint64_t *sizes, uint64_t count,
                          int64_t engine, int64_t *slots)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    const values batch = {.parts = parts, .sizes = sizes, .count = count};
    return write_batch(region, &batch, engine, slots);
}

int ndm_region_write_packed(ndm_region *region, const void *data, uint64_t size, const int64_t *lengths, uint64_t count,
                            int64_t engine, int64_t *slots)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    uint64_t left = size;
    for (uint64_t i = 0; i < count; i++) {
        if (lengths[i] < 0)
            return ndm_i_fail(NDM_ERR_ARGUMENT, "a length is negative");
        if ((uint64_t)lengths[i] > left)
            return ndm_i_fail(NDM_ERR_ARGUMENT, "the lengths add up to more than the buffer");
        left -= (uint64_t)lengths[i];
    }
    if (left > 0)
        return ndm_i_fail(NDM_ERR_ARGUMENT, "the lengths add up to less than the buffer");
    const values batch = {.data = data, .lengths = lengths, .count = count};
    return write_batch(region, &batch, engine, slots);
}

/* ---- freeing and reading -------------------------------------------------------------------------------- */

int ndm_i_check_slots(ndm_region *region, const int64_t *slots, uint64_t count, bool once)
{
    uint64_t *seen = NULL; /* a bit per slot of the table */
    int status = NDM_OK;
    if (once && !(seen = calloc(region->slots.count / 64 + 1, sizeof *seen)))
        return ndm_i_fail(NDM_ERR_MEMORY, "no memory for a batch");
    for (uint64_t i = 0; i < count && status == NDM_OK; i++) {
        const int64_t slot = slots[i];
        if (!ndm_i_live_record(region, slot))
            status = ndm_i_fail_slot(ndm_last_error()->status, slot);
        else if (once && seen[slot / 64] >> (slot % 64) & 1)
            status = ndm_i_fail(NDM_ERR_ARGUMENT, "a slot is listed twice");
        else if (once)
            seen[slot / 64] |= (uint64_t)1 << (slot % 64);
    }
    free(seen);
    return status;
}

int ndm_region_free_many(ndm_region *region, const int64_t *slots, uint64_t count)
{
    int status = ndm_i_enter(region);
    if (status == NDM_OK)
        status = ndm_i_check_slots(region, slots, count, true);
    for (uint64_t i = 0; i < count && status == NDM_OK; i++)
        ndm_i_remove_value(region, (uint32_t)slots[i]);
    return status;
}

int ndm_region_read_many(ndm_region *region, const int64_t *slots, uint64_t count, const char **views, uint64_t *sizes)
{
    int status = ndm_i_enter(region);
    if (status == NDM_OK)
        status = ndm_i_check_slots(region, slots, count, false);
    uint64_t done = 0;
    for (; done < count && status == NDM_OK; done++) {
        const ndm_i_record *record = ndm_i_slots_record(&region->slots, slots[done]);
        if (!(views[done] = ndm_i_view_value(region, record)))
            status = ndm_last_error()->status;
        sizes[done] = ndm_i_record_size(record);
    }
    if (status != NDM_OK)
        while (done-- > 0)
            ndm_view_release(views[done]);
    return status;
}

int64_t ndm_region_load_many(ndm_region *region, const int64_t *slots, uint64_t count, void *buffer, uint64_t capacity,
                             int64_t *lengths)
{
    int status = ndm_i_enter(region);
    if (status == NDM_OK)
        status = ndm_i_check_slots(region, slots, count, false);
    if (status != NDM_OK)
        return status;
    uint64_t total = 0;
    for (uint64_t i = 0; i < count; i++)
        total += ndm_i_record_size(ndm_i_slots_record(&region->slots, slots[i]));
    uint8_t *next = buffer;
    for (uint64_t i = 0; i < count && total <= capacity; i++) {
        const ndm_i_record *record = ndm_i_slots_record(&region->slots, slots[i]);
        const uint64_t size = ndm_i_record_size(record);
        if (size > 0)
            status = ndm_i_grains_load(&region->grains, ndm_i_record_offset(record), next, size);
        if (status != NDM_OK)
            return status;
        lengths[i] = (int64_t)size;
        next += size;
    }
    return (int64_t)total;
}
