/* One value: views, private copies, pins, and copies out. */
#include "region/read.h"

#include "os/status.h"

const char *ndm_i_add_view(ndm_region *region, const ndm_i_record *record)
{
    const uint64_t size = ndm_i_record_size(record);
    ndm_i_mapping *mapping = region->data.mapping;
    if (size == 0)
        return ndm_i_empty_view;
    const char *view = (const char *)mapping->base + ndm_i_record_offset(record);
    return ndm_i_pin(region, ndm_i_record_link(record), mapping, view, size, false) == NDM_OK ? view : NULL;
}

const char *ndm_i_view_value(ndm_region *region, const ndm_i_record *record)
{
    const uint64_t offset = ndm_i_record_offset(record), size = ndm_i_record_size(record);
    const char *view = ndm_i_add_view(region, record);
    if (view) {
        ndm_i_let_others(region);
        ndm_i_store_fetch(&region->store, offset, view, size);
    }
    return view;
}

const char *ndm_region_read(ndm_region *region, int64_t slot, uint64_t *size)
{
    if (ndm_i_enter(region) != NDM_OK)
        return NULL;
    NDM_I_LEAVES(region);
    const ndm_i_record *record = ndm_i_live_record(region, slot);
    if (!record)
        return NULL;
    const uint64_t bytes = ndm_i_record_size(record);
    const char *view = ndm_i_view_value(region, record);
    if (view)
        *size = bytes;
    return view;
}

int ndm_region_try_read(ndm_region *region, int64_t slot, const char **view, uint64_t *size)
{
    int status = ndm_i_enter_at_once(region);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    const ndm_i_record *record = ndm_i_live_record(region, slot);
    if (!record)
        return ndm_last_error()->status;
    if (ndm_i_store_has_failed(&region->store) ||
        !ndm_i_store_at_hand(&region->store, ndm_i_record_offset(record), ndm_i_record_size(record)))
        return NDM_ERR_WAIT;
    const char *added = ndm_i_add_view(region, record);
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
    NDM_I_LEAVES(region);
    const ndm_i_record *record = ndm_i_live_record(region, slot);
    if (!record)
        return NULL;
    if (ndm_i_record_size(record) == 0) {
        *size = 0;
        return ndm_i_empty_view;
    }
    const uint64_t offset = ndm_i_record_offset(record), bytes = ndm_i_record_size(record);
    char *view;
    ndm_i_fork_bar();
    ndm_i_mapping *mapping = ndm_i_mapping_new_private(region->data.fd, offset, bytes, &view);
    const bool pinned =
        mapping && ndm_i_pin(region, ndm_i_record_link(record), mapping, view, bytes, false) == NDM_OK;
    ndm_i_mapping_unref(mapping); /* the view holds it */
    ndm_i_fork_let();
    if (!pinned)
        return NULL;
    ndm_i_let_others(region);
    ndm_i_store_fetch(&region->store, offset, view, bytes);
    *size = bytes;
    return view;
}

void ndm_view_release(const char *view)
{
    if (view && view != ndm_i_empty_view)
        ndm_i_pins_drop(view, true);
}

int ndm_view_try_release(const char *view)
{
    return !view || view == ndm_i_empty_view || ndm_i_pins_drop(view, false) ? NDM_OK : NDM_ERR_WAIT;
}

/* By a thread of many: others come in while the bytes are copied, and a view keeps them where they are. */
static __attribute__((noinline)) int copy_viewed(ndm_region *region, const ndm_i_record *record, void *buffer)
{
    const uint64_t offset = ndm_i_record_offset(record), size = ndm_i_record_size(record);
    const char *view = ndm_i_view_value(region, record);
    if (!view)
        return ndm_last_error()->status;
    const bool let = ndm_i_gate_let(&region->gate);
    const int status = ndm_i_store_load_viewed(&region->store, offset, view, buffer, size);
    ndm_view_release(view);
    ndm_i_gate_come_back(&region->gate, let);
    return status;
}

int64_t ndm_region_read_into(ndm_region *region, int64_t slot, void *buffer, uint64_t capacity)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    const ndm_i_record *record = ndm_i_live_record(region, slot);
    if (!record)
        return ndm_last_error()->status;
    const uint64_t size = ndm_i_record_size(record);
    if (size > 0 && size <= capacity)
        status = region->gate.shared
                     ? copy_viewed(region, record, buffer)
                     : ndm_i_store_load(&region->store, ndm_i_record_offset(record), buffer, size);
    return status == NDM_OK ? (int64_t)size : status;
}

/* ---- pins: views, typed as bytes ------------------------------------------------------------------------ */

const uint8_t *ndm_region_pin(ndm_region *region, int64_t slot, uint64_t *size)
{
    uint64_t ignored;
    return (const uint8_t *)ndm_region_read(region, slot, size ? size : &ignored);
}

void ndm_region_unpin(const uint8_t *data) { ndm_view_release((const char *)data); }
