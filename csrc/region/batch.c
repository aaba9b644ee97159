/* Many values in one call, all or nothing. */
#include "region/batch.h"

#include "os/status.h"
#include "region/read.h"
#include "region/room.h"
#include "store/gather.h"

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
            room->size > 0
                ? ndm_i_store_put(&region->store, room->offset, source, room->size, ndm_i_vacant(region, room))
                : NDM_OK;
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
    ndm_i_let_others(region);
    status = store_all(region, batch, rooms);
    if (status != NDM_OK && ndm_i_room_other(region, rooms, batch->count, &before, status))
        status = store_all(region, batch, rooms);
    if ((status = ndm_i_let_nobody(region, status, batch->count)) == NDM_OK) {
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
    NDM_I_LEAVES(region);
    const values batch = {.parts = parts, .sizes = sizes, .count = count};
    return write_batch(region, &batch, engine, slots);
}

int ndm_region_write_packed(ndm_region *region, const void *data, uint64_t size, const int64_t *lengths, uint64_t count,
                            int64_t engine, int64_t *slots)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
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
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    status = ndm_i_check_slots(region, slots, count, true);
    for (uint64_t i = 0; i < count && status == NDM_OK; i++)
        ndm_i_remove_value(region, (uint32_t)slots[i]);
    return status;
}

/* ---- reading -------------------------------------------------------------------------------------------- */

/* Does some of the batch seem to be missing from RAM, where only the kernel knows? Its answer takes 400 ns. So that a batch
 * in RAM takes no longer for it, it is asked once in the time of 64 answers: a value takes 50 ns, and if it is `copied`,
 * 24 bytes one. */
static bool looks_cold(ndm_region *region, const int64_t *slots, uint64_t count, uint64_t copied)
{
    enum { MOST_ANSWERS = 64, TIME_OF_ONE = 64 * 400, EACH = 50, BYTES_A_NS = 24 };
    const uint64_t time = count * EACH + copied / BYTES_A_NS;
    if (time < TIME_OF_ONE)
        return false;
    const uint64_t answers = ndm_i_min(ndm_i_min(time / TIME_OF_ONE, MOST_ANSWERS), count);
    bool cold = false;
    for (uint64_t i = 0; i < answers && !cold; i++) {
        const ndm_i_record *record = ndm_i_slots_record(&region->slots, slots[count / answers * i]);
        const uint64_t size = ndm_i_record_size(record);
        cold = size > 0 && ndm_i_store_misses(&region->store, ndm_i_record_offset(record), size);
    }
    return cold;
}

/* The places of a batch, each with the number of bytes before it. NULL: no memory. */
static ndm_i_wanted *places_of(const ndm_region *region, const int64_t *slots, uint64_t count, uint64_t *found)
{
    ndm_i_wanted *places = malloc(count * sizeof *places);
    uint64_t bytes = 0;
    *found = 0;
    for (uint64_t i = 0; places && i < count; i++) {
        const ndm_i_record *record = ndm_i_slots_record(&region->slots, slots[i]);
        const uint64_t size = ndm_i_record_size(record);
        if (size > 0)
            places[(*found)++] = (ndm_i_wanted){.offset = ndm_i_record_offset(record), .size = size, .tag = bytes};
        bytes += size;
    }
    return places;
}

static void release_all(const char **views, uint64_t *sizes, uint64_t count)
{
    while (count-- > 0) {
        ndm_view_release(views[count]);
        views[count] = NULL;
        sizes[count] = 0;
    }
}

/* View all values of a batch, or none. */
static int view_all(ndm_region *region, const int64_t *slots, uint64_t count, const char **views, uint64_t *sizes)
{
    int status = ndm_i_check_slots(region, slots, count, false);
    uint64_t done = 0;
    for (; done < count && status == NDM_OK; done++) {
        const ndm_i_record *record = ndm_i_slots_record(&region->slots, slots[done]);
        if (!(views[done] = ndm_i_add_view(region, record)))
            status = ndm_last_error()->status;
        sizes[done] = ndm_i_record_size(record);
    }
    if (status != NDM_OK)
        release_all(views, sizes, done);
    return status;
}

/* Their places, in a file that is mapped at `base`. NULL: no memory. */
static ndm_i_wanted *viewed_places(const char *base, const char *const *views, const uint64_t *sizes, uint64_t count,
                                   uint64_t *found)
{
    ndm_i_wanted *places = malloc(count * sizeof *places);
    uint64_t bytes = 0;
    *found = 0;
    for (uint64_t i = 0; places && i < count; i++) {
        if (sizes[i] > 0)
            places[(*found)++] = (ndm_i_wanted){.offset = (uint64_t)(views[i] - base), .size = sizes[i], .tag = bytes};
        bytes += sizes[i];
    }
    return places;
}

/* Ask for all of them. false: no memory to do so. */
static bool gather(ndm_region *region, const char *base, const char *const *views, const uint64_t *sizes, uint64_t count)
{
    uint64_t found;
    ndm_i_wanted *places = viewed_places(base, views, sizes, count, &found);
    if (places)
        ndm_i_store_gather(&region->store, (const uint8_t *)base, places, found);
    free(places);
    return places != NULL;
}

/* Have what is viewed in RAM: one value after the other, until one has to be fetched. */
static void fetch_all(ndm_region *region, const int64_t *slots, const char *const *views, const uint64_t *sizes,
                      uint64_t count)
{
    const char *base = (const char *)region->data.mapping->base;
    bool gathered = looks_cold(region, slots, count, 0);
    ndm_i_let_others(region);
    gathered = gathered && gather(region, base, views, sizes, count);
    for (uint64_t i = 0; i < count && !gathered; i++) {
        const uint64_t misses = region->store.misses;
        if (sizes[i] > 0)
            ndm_i_store_fetch(&region->store, (uint64_t)(views[i] - base), views[i], sizes[i]);
        if (region->store.misses > misses)
            gathered = gather(region, base, views + i + 1, sizes + i + 1, count - i - 1);
    }
}

int ndm_region_read_many(ndm_region *region, const int64_t *slots, uint64_t count, const char **views, uint64_t *sizes)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    if ((status = view_all(region, slots, count, views, sizes)) == NDM_OK)
        fetch_all(region, slots, views, sizes, count);
    return status;
}

/* Copies of a batch: values from `done` on are still to come, and go to `next`. */
typedef struct {
    const int64_t *slots;
    uint64_t count, done;
    uint8_t *next;
    int64_t *lengths;
} copies;

/* One after the other; as long as nothing has to be fetched, if `warm`. */
static int load_in_turn(ndm_region *region, copies *batch, bool warm)
{
    const uint64_t misses = region->store.misses;
    uint64_t i = batch->done;
    uint8_t *next = batch->next;
    int status = NDM_OK;
    for (; i < batch->count && status == NDM_OK && (region->store.misses == misses || !warm); i++) {
        const ndm_i_record *record = ndm_i_slots_record(&region->slots, batch->slots[i]);
        const uint64_t size = ndm_i_record_size(record);
        if (size > 0)
            status = ndm_i_store_load(&region->store, ndm_i_record_offset(record), next, size);
        batch->lengths[i] = (int64_t)size;
        next += size;
    }
    batch->done = i;
    batch->next = next;
    return status;
}

/* The rest, in the order of the file. */
static int load_gathered(ndm_region *region, copies *batch)
{
    uint64_t found;
    ndm_i_wanted *places = places_of(region, batch->slots + batch->done, batch->count - batch->done, &found);
    if (!places)
        return load_in_turn(region, batch, false);
    const int status =
        ndm_i_store_load_many(&region->store, region->data.mapping->base, places, found, batch->next);
    free(places);
    for (; status == NDM_OK && batch->done < batch->count; batch->done++)
        batch->lengths[batch->done] =
            (int64_t)ndm_i_record_size(ndm_i_slots_record(&region->slots, batch->slots[batch->done]));
    return status;
}

/* By a thread of many: views keep the values where they are while others come in. `buffer` NULL: they are asked for, no
 * more. */
static int load_viewed(ndm_region *region, const int64_t *slots, uint64_t count, uint8_t *buffer, int64_t *lengths)
{
    const char **views = malloc(count * sizeof *views), *base = (const char *)region->data.mapping->base;
    uint64_t *sizes = malloc(count * sizeof *sizes), found;
    ndm_i_wanted *places = NULL;
    int status = NDM_ERR_MEMORY;
    if (views && sizes && (status = view_all(region, slots, count, views, sizes)) == NDM_OK) {
        places = viewed_places(base, views, sizes, count, &found);
        status = places ? NDM_OK : NDM_ERR_MEMORY;
        ndm_i_let_others(region);
        if (places && buffer)
            status = ndm_i_store_load_many(&region->store, (const uint8_t *)base, places, found, buffer);
        else if (places)
            ndm_i_store_gather(&region->store, (const uint8_t *)base, places, found);
        for (uint64_t i = 0; lengths && i < count; i++)
            lengths[i] = (int64_t)sizes[i];
        const bool let = ndm_i_gate_let(&region->gate);
        release_all(views, sizes, count);
        ndm_i_gate_come_back(&region->gate, let);
    }
    free(places);
    free(sizes);
    free(views);
    return status == NDM_ERR_MEMORY ? ndm_i_fail(NDM_ERR_MEMORY, "no memory for a batch") : status;
}

/* Asks for the values of a batch. A hint: where no memory can be had, nothing is asked for. */
static void ask_for(ndm_region *region, const int64_t *slots, uint64_t count)
{
    const ndm_error before = *ndm_last_error();
    uint64_t found;
    if (region->gate.shared) {
        load_viewed(region, slots, count, NULL, NULL);
        ndm_i_ended(NDM_OK, &before);
        return;
    }
    ndm_i_wanted *places = places_of(region, slots, count, &found);
    if (places)
        ndm_i_store_gather(&region->store, region->data.mapping->base, places, found);
    free(places);
}

int ndm_region_prefetch(ndm_region *region, const int64_t *slots, uint64_t count)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    if ((status = ndm_i_check_slots(region, slots, count, false)) == NDM_OK && count > 0)
        ask_for(region, slots, count);
    return status;
}

int64_t ndm_region_load_many(ndm_region *region, const int64_t *slots, uint64_t count, void *buffer, uint64_t capacity,
                             int64_t *lengths)
{
    uint64_t total = 0;
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    for (uint64_t i = 0; i < count && status == NDM_OK; i++) {
        const ndm_i_record *record = ndm_i_live_record(region, slots[i]);
        if (record)
            total += ndm_i_record_size(record);
        else
            status = ndm_i_fail_slot(ndm_last_error()->status, slots[i]);
    }
    if (status != NDM_OK)
        return status;
    if (total > capacity)
        return (int64_t)total;
    if (region->gate.shared && count > 0)
        return (status = load_viewed(region, slots, count, buffer, lengths)) == NDM_OK ? (int64_t)total : status;
    copies batch = {.slots = slots, .count = count, .next = buffer, .lengths = lengths};
    if (!looks_cold(region, slots, count, total))
        status = load_in_turn(region, &batch, true);
    if (status == NDM_OK && batch.done < count)
        status = load_gathered(region, &batch);
    return status == NDM_OK ? (int64_t)total : status;
}
