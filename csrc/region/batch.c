/* Many values in one call, all or nothing. */
#include "region/batch.h"

#include "os/status.h"
#include "region/read.h"
#include "region/room.h"

#include <stdlib.h>

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

static int store_all(ndm_region *region, const values *batch, const ndm_i_room *rooms)
{
    const uint8_t *packed = batch->data;
    for (uint64_t i = 0; i < batch->count; i++) {
        const ndm_i_room *room = &rooms[i];
        const void *source = batch->parts ? batch->parts[i] : packed;
        const int status =
            room->size > 0 ? ndm_i_store_put(&region->store, room->offset, source, room->size, room->vacant) : NDM_OK;
        if (status != NDM_OK)
            return status;
        if (!batch->parts)
            packed += room->size;
    }
    return NDM_OK;
}

static int write_batch(ndm_region *region, const values *batch, int64_t engine, int64_t *slots)
{
    ndm_i_before before;
    int status = ndm_i_check_engine(engine);
    if (status != NDM_OK || batch->count == 0)
        return status;
    if (batch->count > NDM_I_NO_SLOT) /* no table has so many slots */
        return ndm_i_slots_reserve(&region->slots, batch->count);
    ndm_i_room *rooms = malloc(batch->count * sizeof *rooms);
    if (!rooms)
        return ndm_i_fail(NDM_ERR_MEMORY, "no memory for a batch");
    for (uint64_t i = 0; i < batch->count; i++)
        rooms[i].size = size_at(batch, i);
    if ((status = ndm_i_room_take(region, rooms, batch->count, &before)) != NDM_OK)
        goto end;
    status = store_all(region, batch, rooms);
    if (status != NDM_OK && ndm_i_room_other(region, rooms, batch->count, &before, status))
        status = store_all(region, batch, rooms);
    if (status == NDM_OK) {
        ndm_i_enter_values(region, rooms, batch->count, before, (uint8_t)engine, NDM_I_LIVE, slots);
    } else {
        ndm_i_undo(region, rooms, batch->count, before);
        ndm_i_explained(region, status);
    }

end:
    free(rooms);
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
    while (status != NDM_OK && done-- > 0) {
        ndm_view_release(views[done]);
        views[done] = NULL;
        sizes[done] = 0;
    }
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
            status = ndm_i_store_load(&region->store, ndm_i_record_offset(record), next, size);
        if (status != NDM_OK)
            return status;
        lengths[i] = (int64_t)size;
        next += size;
    }
    return (int64_t)total;
}
