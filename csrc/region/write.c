/* One value: write, gather, allocate, commit, free. */
#include "region/room.h"

#include "os/status.h"
#include "store/direct.h"

#include <stdlib.h>

/* What every writing verb checks first, and room for its value. Then others may come in. */
static inline __attribute__((always_inline)) int begin(ndm_region *region, int64_t engine, ndm_i_room *room,
                                                       ndm_i_before *before)
{
    int status = ndm_i_check_engine(engine);
    if (status == NDM_OK)
        status = ndm_i_room_take(region, room, 1, before);
    if (status == NDM_OK)
        ndm_i_let_others(region);
    return status;
}

/* Enter the value if its bytes were stored; undo all if not. */
static int64_t end(ndm_region *region, int status, const ndm_i_room *room, ndm_i_before before, int64_t engine,
                   uint8_t state)
{
    int64_t slot;
    if ((status = ndm_i_let_nobody(region, status, 1)) != NDM_OK) {
        ndm_i_undo(region, room, 1, before);
        return ndm_i_explained(region, status);
    }
    ndm_i_enter_values(region, room, 1, before, (uint8_t)engine, state, &slot);
    return slot;
}

int64_t ndm_region_write(ndm_region *region, const void *data, uint64_t size, int64_t engine)
{
    ndm_i_before before;
    ndm_i_room room = {.size = size};
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    if ((status = begin(region, engine, &room, &before)) != NDM_OK)
        return status;
    if (size > 0)
        status = ndm_i_store_put(&region->store, room.offset, data, size, room.vacant);
    if (status != NDM_OK && ndm_i_room_other(region, &room, 1, &before, status))
        status = ndm_i_store_put(&region->store, room.offset, data, size, room.vacant);
    return end(region, status, &room, before, engine, NDM_I_LIVE);
}

/* Size of the value that `count` parts make, each but the first starting at a multiple of `alignment`; UINT64_MAX when
 * that is more than any region holds. */
static uint64_t vectored_size(const uint64_t *sizes, uint64_t count, uint64_t alignment)
{
    uint64_t total = 0;
    for (uint64_t i = 0; i < count; i++) {
        total = (total + alignment - 1) & ~(alignment - 1);
        if (sizes[i] >= NDM_I_SIZE_LIMIT || (total += sizes[i]) >= NDM_I_SIZE_LIMIT)
            return UINT64_MAX;
    }
    return total;
}

static const uint8_t padding[4096]; /* between parts: less than an alignment */

/* A large value is gathered by the system, so that its pages are not mapped here. */
static int gather_parts(ndm_region *region, const ndm_i_room *room, const void *const *parts, const uint64_t *sizes,
                        uint64_t count, uint64_t alignment)
{
    struct iovec *pieces = malloc(2 * count * sizeof *pieces);
    uint64_t at = 0, used = 0;
    if (!pieces)
        return ndm_i_fail(NDM_ERR_MEMORY, "no memory to gather a value");
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t gap = ((at + alignment - 1) & ~(alignment - 1)) - at;
        if (gap > 0)
            pieces[used++] = (struct iovec){(void *)padding, gap};
        if (sizes[i] > 0)
            pieces[used++] = (struct iovec){(void *)parts[i], sizes[i]};
        at += gap + sizes[i];
    }
    const int status = ndm_i_direct_gather(&region->store, room->offset, pieces, used, room->size);
    free(pieces);
    return status;
}

static int store_parts(ndm_region *region, const ndm_i_room *room, const void *const *parts, const uint64_t *sizes,
                       uint64_t count, uint64_t alignment)
{
    uint64_t at = 0;
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t start = (at + alignment - 1) & ~(alignment - 1);
        int status = NDM_OK;
        if (start > at)
            status = ndm_i_store_put(&region->store, room->offset + at, padding, start - at, ndm_i_vacant(region, room));
        if (status == NDM_OK && sizes[i] > 0)
            status = ndm_i_store_put(&region->store, room->offset + start, parts[i], sizes[i],
                                     ndm_i_vacant(region, room));
        if (status != NDM_OK)
            return status;
        at = start + sizes[i];
    }
    return NDM_OK;
}

static int put_parts(ndm_region *region, const ndm_i_room *room, const void *const *parts, const uint64_t *sizes,
                     uint64_t count, uint64_t alignment)
{
    return room->size >= NDM_I_LARGE ? gather_parts(region, room, parts, sizes, count, alignment)
                                     : store_parts(region, room, parts, sizes, count, alignment);
}

int64_t ndm_region_write_vectored(ndm_region *region, const void *const *parts, const uint64_t *sizes, uint64_t count,
                                  int aligned, int64_t engine)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    const uint64_t alignment = aligned ? (uint64_t)1 << region->unit_shift : 1;
    ndm_i_before before;
    ndm_i_room room = {.size = vectored_size(sizes, count, alignment)};
    if ((status = begin(region, engine, &room, &before)) != NDM_OK)
        return status;
    status = put_parts(region, &room, parts, sizes, count, alignment);
    if (status != NDM_OK && ndm_i_room_other(region, &room, 1, &before, status))
        status = put_parts(region, &room, parts, sizes, count, alignment);
    return end(region, status, &room, before, engine, NDM_I_LIVE);
}

int64_t ndm_region_allocate(ndm_region *region, uint64_t size, int64_t engine, char **view)
{
    ndm_i_before before;
    ndm_i_room room = {.size = size};
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    if ((status = begin(region, engine, &room, &before)) != NDM_OK)
        return status;
    char *address = ndm_i_empty_view;
    if (size > 0) {
        status = ndm_i_store_clear(&region->store, room.offset, size, room.vacant);
        if (status != NDM_OK && ndm_i_room_other(region, &room, 1, &before, status))
            status = ndm_i_store_clear(&region->store, room.offset, size, room.vacant);
        address = (char *)region->data.mapping->base + room.offset;
        if (status == NDM_OK)
            status = ndm_i_pin(region, room.extent, region->data.mapping, address, size, true);
        const bool pinned = status == NDM_OK;
        if (pinned) /* others may come in, and find that it is stored to */
            ndm_i_writer_admit(&region->store.writer, room.offset / NDM_I_GRAIN, ndm_i_grains_end(room.offset + size));
        if ((status = ndm_i_let_nobody(region, status, 1)) != NDM_OK && pinned)
            ndm_view_release(address);
    }
    if (status == NDM_OK)
        *view = address;
    return end(region, status, &room, before, engine, NDM_I_DRAFT);
}

int ndm_region_commit(ndm_region *region, int64_t slot)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    if (!ndm_i_live_record(region, slot))
        return ndm_last_error()->status;
    ndm_i_slots_commit(&region->slots, (uint32_t)slot);
    return NDM_OK;
}

int ndm_region_free(ndm_region *region, int64_t slot)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    if (!ndm_i_live_record(region, slot))
        return ndm_last_error()->status;
    ndm_i_remove_value(region, (uint32_t)slot);
    return NDM_OK;
}
