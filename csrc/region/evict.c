/* Values leave RAM, and reach the disk: evict and flush. */
#include "region/batch.h"

#include "os/status.h"

/* Everything but the values that have a view, in runs between these. */
static int evict_unpinned(ndm_region *region)
{
    const ndm_i_extents *extents = &region->extents;
    uint64_t start = 0;
    for (uint32_t e = ndm_i_extents_first(extents); e != NDM_I_NONE; e = ndm_i_extents_next(extents, e)) {
        const uint64_t offset = ndm_i_bytes(region, ndm_i_extents_offset(extents, e));
        if (ndm_i_extents_is_free(extents, e) || !ndm_i_pins_pinned(&region->home, e))
            continue;
        int status = offset > start ? ndm_i_store_evict(&region->store, start, offset, false) : NDM_OK;
        if (status != NDM_OK)
            return status;
        start = offset + ndm_i_bytes(region, ndm_i_extents_length(extents, e));
    }
    const uint64_t end = region->data.capacity;
    return end > start ? ndm_i_store_evict(&region->store, start, end, false) : NDM_OK;
}

/* Wait for the disk while others come in; little is left to be written afterwards. */
static void write_ahead(ndm_region *region, uint64_t start, uint64_t end)
{
    ndm_i_let_others(region);
    ndm_i_writer_settle_ahead(&region->store.writer, start, end);
    region->gate.lets = false;
}

/* The same for some values. Others may free them meanwhile. */
static int write_values_ahead(ndm_region *region, const int64_t *slots, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        const ndm_i_record *record = ndm_i_slots_record(&region->slots, slots[i]);
        const uint64_t offset = ndm_i_record_offset(record), size = ndm_i_record_size(record);
        if (size > 0)
            write_ahead(region, offset, offset + size);
    }
    return ndm_i_check_slots(region, slots, count, false);
}

int ndm_region_evict(ndm_region *region, const int64_t *slots, uint64_t count)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    if (!slots) {
        write_ahead(region, 0, region->data.capacity);
        return evict_unpinned(region);
    }
    status = ndm_i_check_slots(region, slots, count, false);
    if (status == NDM_OK && region->gate.shared)
        status = write_values_ahead(region, slots, count);
    for (uint64_t i = 0; i < count && status == NDM_OK; i++) {
        const ndm_i_record *record = ndm_i_live_record(region, slots[i]);
        const uint64_t offset = ndm_i_record_offset(record), size = ndm_i_record_size(record);
        if (size > 0)
            status = ndm_i_store_evict(&region->store, offset, offset + size, true);
    }
    return status;
}

int ndm_region_flush(ndm_region *region)
{
    const int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    write_ahead(region, 0, region->data.capacity);
    return ndm_i_store_flush(&region->store);
}

int ndm_region_is_locked(ndm_region *region)
{
    const int status = ndm_i_enter_to_look(region);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    return ndm_i_mapping_is_locked(region->data.mapping);
}
