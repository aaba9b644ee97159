/* One value: write, allocate, read, restore, free. */
#include "region/ledger.h"

#include "os/status.h"

#include <stdlib.h>
#include <string.h>

/* What of a view's pages leaves the RSS with it. */
static uint64_t forgotten(const ndm_region *region, uint64_t size) { return size >= region->forget_from ? size : 0; }

/* What a view of an empty value points to. */
static char nothing[1];

/* ---- room ----------------------------------------------------------------------------------------------- */

int ndm_i_reach(ndm_region *region, uint64_t end)
{
    if (end <= region->data.capacity)
        return NDM_OK;
    const uint64_t ceiling = ndm_i_ceiling(region->max_capacity);
    if (end > ceiling)
        return ndm_i_fail_capacity(end, ceiling);
    uint64_t wanted = region->data.capacity * 2;
    if (wanted < end)
        wanted = end;
    if (wanted > ceiling)
        wanted = ceiling;
    return ndm_i_grains_grow(&region->grains, end, wanted, ceiling);
}

uint64_t ndm_i_vacant(const ndm_region *region, ndm_i_place place)
{
    const ndm_i_extents *extents = &region->extents;
    if (place.hole == NDM_I_NONE || place.hole == ndm_i_extents_last(extents))
        return UINT64_MAX;
    return (place.offset + ndm_i_extents_length(extents, place.hole)) << region->unit_shift;
}

static void choose(const ndm_region *region, ndm_i_spot *spot)
{
    spot->place = ndm_i_extents_find(&region->extents, ndm_i_units(region, spot->size));
    spot->offset = spot->place.offset << region->unit_shift;
    spot->vacant = ndm_i_vacant(region, spot->place);
}

int ndm_i_spot_find(ndm_region *region, uint64_t size, ndm_i_spot *spot)
{
    if (size >= NDM_I_SIZE_LIMIT / 2)
        return ndm_i_fail_capacity(size, ndm_i_ceiling(region->max_capacity));
    if (!ndm_i_extents_reserve(&region->extents))
        return ndm_i_fail(NDM_ERR_MEMORY, "no memory for an extent");
    *spot = (ndm_i_spot){.size = size, .capacity = region->data.capacity};
    choose(region, spot);
    if (spot->offset + size > region->data.capacity) { /* growing is when space is short */
        ndm_i_leased_collect(region, true);
        choose(region, spot); /* what came home may have joined the hole that was found */
    }
    return ndm_i_reach(region, spot->offset + size);
}

void ndm_i_spot_leave(ndm_region *region, const ndm_i_spot *spot)
{
    if (region->data.capacity > spot->capacity)
        ndm_i_grains_shrink(&region->grains, spot->capacity);
}

/* ---- the books ------------------------------------------------------------------------------------------ */

int ndm_i_check_engine(int64_t engine)
{
    return engine >= 0 && engine <= 255 ? NDM_OK : ndm_i_fail(NDM_ERR_ARGUMENT, "engine must be 0 to 255");
}

void ndm_i_publish(ndm_region *region)
{
    ndm_i_header *header = ndm_i_slots_header(&region->slots);
    atomic_store_explicit(&header->capacity, region->data.capacity, memory_order_relaxed);
    atomic_store_explicit(&header->max_capacity, region->max_capacity, memory_order_relaxed);
    atomic_store_explicit(&header->used_bytes, region->used_bytes, memory_order_relaxed);
    atomic_store_explicit(&header->live_bytes, region->live_bytes, memory_order_relaxed);
    atomic_store_explicit(&header->pinned_bytes, region->pinned_bytes, memory_order_relaxed);
}

void ndm_i_count_value(ndm_region *region, uint64_t offset, uint64_t size, uint8_t engine)
{
    region->live_bytes += size;
    region->engine_bytes[engine] += size;
    region->engine_slots[engine]++;
    if (region->used_bytes < offset + size)
        region->used_bytes = offset + size;
}

uint32_t ndm_i_enter_value(ndm_region *region, uint64_t offset, uint64_t size, uint32_t extent, uint8_t engine,
                           uint8_t state)
{
    const uint32_t slot = ndm_i_slots_add(&region->slots, offset, size, engine, extent, state);
    if (extent != NDM_I_NONE)
        ndm_i_extents_set_tag(&region->extents, extent, slot);
    ndm_i_count_value(region, offset, size, engine);
    ndm_i_publish(region);
    return slot;
}

/* The bytes are in the spot: take it, and enter the value. */
static uint32_t settle(ndm_region *region, const ndm_i_spot *spot, uint8_t engine)
{
    const uint32_t extent =
        ndm_i_extents_take(&region->extents, spot->place, ndm_i_units(region, spot->size), NDM_I_NONE);
    region->growths += region->data.capacity > spot->capacity;
    return ndm_i_enter_value(region, spot->offset, spot->size, extent, engine, NDM_I_LIVE);
}

void ndm_i_remove_value(ndm_region *region, uint32_t slot)
{
    const ndm_i_record *record = ndm_i_slots_record(&region->slots, slot);
    const uint32_t extent = ndm_i_record_link(record);
    const uint8_t engine = ndm_i_record_engine(record);
    region->live_bytes -= ndm_i_record_size(record);
    region->engine_bytes[engine] -= ndm_i_record_size(record);
    region->engine_slots[engine]--;
    const uint32_t generation = ndm_i_record_generation(record);
    ndm_i_slots_remove(&region->slots, slot);
    if (extent == NDM_I_NONE)
        return;
    if (ndm_i_leases_has(&region->leases, slot, generation)) {
        /* Without memory to note it, nobody gives the extent back until the region is closed: better to lose its space
         * than to let a reader see other bytes. */
        ndm_i_leased_keep(region, extent, slot, generation);
        ndm_i_orphan_leaves(region, extent);
    } else if (ndm_i_views_orphan(&region->home, extent)) {
        ndm_i_orphan_leaves(region, extent);
    } else {
        ndm_i_extents_release(&region->extents, extent);
    }
    ndm_i_publish(region);
}

int ndm_region_free(ndm_region *region, int64_t slot)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    if (!ndm_i_live_record(region, slot))
        return ndm_last_error()->status;
    ndm_i_remove_value(region, (uint32_t)slot);
    return NDM_OK;
}

/* ---- writing -------------------------------------------------------------------------------------------- */

/* What every writing verb checks and reserves first. */
static int begin(ndm_region *region, int64_t engine)
{
    int status = ndm_i_enter(region);
    if (status == NDM_OK)
        status = ndm_i_check_engine(engine);
    return status == NDM_OK ? ndm_i_slots_reserve(&region->slots, 1) : status;
}

int64_t ndm_region_write(ndm_region *region, const void *data, uint64_t size, int64_t engine)
{
    ndm_i_spot spot;
    int status = begin(region, engine);
    if (status != NDM_OK)
        return status;
    if (size == 0)
        return ndm_i_enter_value(region, 0, 0, NDM_I_NONE, (uint8_t)engine, NDM_I_LIVE);
    if ((status = ndm_i_spot_find(region, size, &spot)) != NDM_OK)
        return status;
    if ((status = ndm_i_grains_store(&region->grains, spot.offset, data, size, spot.vacant)) != NDM_OK) {
        ndm_i_spot_leave(region, &spot);
        return status;
    }
    return settle(region, &spot, (uint8_t)engine);
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

static int store_parts(ndm_region *region, const ndm_i_spot *spot, const void *const *parts, const uint64_t *sizes,
                       uint64_t count, uint64_t alignment)
{
    static const uint8_t padding[4096];
    uint64_t at = 0;
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t start = (at + alignment - 1) & ~(alignment - 1);
        int status = NDM_OK;
        if (start > at)
            status = ndm_i_grains_store(&region->grains, spot->offset + at, padding, start - at, spot->vacant);
        if (status == NDM_OK && sizes[i] > 0)
            status = ndm_i_grains_store(&region->grains, spot->offset + start, parts[i], sizes[i], spot->vacant);
        if (status != NDM_OK)
            return status;
        at = start + sizes[i];
    }
    return NDM_OK;
}

int64_t ndm_region_write_vectored(ndm_region *region, const void *const *parts, const uint64_t *sizes, uint64_t count,
                                  int aligned, int64_t engine)
{
    ndm_i_spot spot;
    int status = begin(region, engine);
    if (status != NDM_OK)
        return status;
    const uint64_t alignment = aligned ? (uint64_t)1 << region->unit_shift : 1;
    const uint64_t size = vectored_size(sizes, count, alignment);
    if (size == 0)
        return ndm_i_enter_value(region, 0, 0, NDM_I_NONE, (uint8_t)engine, NDM_I_LIVE);
    if ((status = ndm_i_spot_find(region, size, &spot)) != NDM_OK)
        return status;
    if ((status = store_parts(region, &spot, parts, sizes, count, alignment)) != NDM_OK) {
        ndm_i_spot_leave(region, &spot);
        return status;
    }
    return settle(region, &spot, (uint8_t)engine);
}

int64_t ndm_region_allocate(ndm_region *region, uint64_t size, int64_t engine, char **view)
{
    ndm_i_spot spot;
    int status = begin(region, engine);
    if (status != NDM_OK)
        return status;
    if (size == 0) {
        *view = nothing;
        return ndm_i_enter_value(region, 0, 0, NDM_I_NONE, (uint8_t)engine, NDM_I_DRAFT);
    }
    if ((status = ndm_i_spot_find(region, size, &spot)) != NDM_OK)
        return status;
    if ((status = ndm_i_grains_clear(&region->grains, spot.offset, size, spot.vacant)) != NDM_OK)
        goto fail;
    char *address = (char *)region->data.mapping->base + spot.offset;
    const uint64_t mark = region->extents.mark;
    const uint32_t extent = ndm_i_extents_take(&region->extents, spot.place, ndm_i_units(region, size), NDM_I_NONE);
    if (!ndm_i_views_add(&region->home, extent, region->data.mapping, address, forgotten(region, size), true)) {
        status = ndm_i_fail(NDM_ERR_MEMORY, "no memory for a view");
        ndm_i_extents_release(&region->extents, extent);
        ndm_i_extents_lower(&region->extents, mark);
        goto fail;
    }
    region->growths += region->data.capacity > spot.capacity;
    *view = address;
    return ndm_i_enter_value(region, spot.offset, size, extent, (uint8_t)engine, NDM_I_DRAFT);

fail:
    ndm_i_spot_leave(region, &spot);
    return status;
}

int ndm_region_commit(ndm_region *region, int64_t slot)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    if (!ndm_i_live_record(region, slot))
        return ndm_last_error()->status;
    ndm_i_slots_commit(&region->slots, (uint32_t)slot);
    return NDM_OK;
}

/* ---- reading -------------------------------------------------------------------------------------------- */

static const char *add_view(ndm_region *region, const ndm_i_record *record)
{
    const uint64_t size = ndm_i_record_size(record);
    ndm_i_mapping *mapping = region->data.mapping;
    const char *view = size == 0 ? nothing : (const char *)mapping->base + ndm_i_record_offset(record);
    if (size > 0 &&
        !ndm_i_views_add(&region->home, ndm_i_record_link(record), mapping, view, forgotten(region, size), false)) {
        ndm_i_fail(NDM_ERR_MEMORY, "no memory for a view");
        return NULL;
    }
    return view;
}

const char *ndm_i_view_value(ndm_region *region, const ndm_i_record *record)
{
    const char *view = add_view(region, record);
    if (view)
        ndm_i_grains_fetch(&region->grains, ndm_i_record_offset(record), ndm_i_record_size(record));
    return view;
}

const char *ndm_region_read(ndm_region *region, int64_t slot, uint64_t *size)
{
    if (ndm_i_enter(region) != NDM_OK)
        return NULL;
    const ndm_i_record *record = ndm_i_live_record(region, slot);
    if (!record)
        return NULL;
    const char *view = ndm_i_view_value(region, record);
    if (view)
        *size = ndm_i_record_size(record);
    return view;
}

int ndm_region_try_read(ndm_region *region, int64_t slot, const char **view, uint64_t *size)
{
    int status = ndm_i_enter_to_look(region);
    if (status != NDM_OK)
        return status;
    const ndm_i_record *record = ndm_i_live_record(region, slot);
    if (!record)
        return ndm_last_error()->status;
    if (atomic_load_explicit(&region->grains.cache.error, memory_order_relaxed) ||
        !ndm_i_grains_at_hand(&region->grains, ndm_i_record_offset(record), ndm_i_record_size(record)))
        return NDM_ERR_WAIT;
    const char *added = add_view(region, record);
    if (!added)
        return ndm_last_error()->status;
    *view = added;
    *size = ndm_i_record_size(record);
    return NDM_OK;
}

char *ndm_region_restore(ndm_region *region, int64_t slot, uint64_t *size)
{
    if (ndm_i_enter(region) != NDM_OK)
        return NULL;
    const ndm_i_record *record = ndm_i_live_record(region, slot);
    if (!record)
        return NULL;
    if (ndm_i_record_size(record) == 0) {
        *size = 0;
        return nothing;
    }
    char *view;
    ndm_i_mapping *mapping =
        ndm_i_backing_map_private(&region->data, ndm_i_record_offset(record), ndm_i_record_size(record), &view);
    if (!mapping)
        return NULL;
    const bool added =
        ndm_i_views_add(&region->home, ndm_i_record_link(record), mapping, view, 0, false);
    ndm_i_mapping_unref(mapping); /* the view holds it */
    if (!added) {
        ndm_i_fail(NDM_ERR_MEMORY, "no memory for a view");
        return NULL;
    }
    ndm_i_grains_fetch(&region->grains, ndm_i_record_offset(record), ndm_i_record_size(record));
    *size = ndm_i_record_size(record);
    return view;
}

void ndm_view_release(const char *view)
{
    if (view && view != nothing)
        ndm_i_views_drop(view, true);
}

int ndm_view_try_release(const char *view)
{
    return !view || view == nothing || ndm_i_views_drop(view, false) ? NDM_OK : NDM_ERR_WAIT;
}

int64_t ndm_region_read_into(ndm_region *region, int64_t slot, void *buffer, uint64_t capacity)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    const ndm_i_record *record = ndm_i_live_record(region, slot);
    if (!record)
        return ndm_last_error()->status;
    const uint64_t size = ndm_i_record_size(record);
    if (size > 0 && size <= capacity)
        status = ndm_i_grains_load(&region->grains, ndm_i_record_offset(record), buffer, size);
    return status == NDM_OK ? (int64_t)size : status;
}
