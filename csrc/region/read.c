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
    const char *view = ndm_i_add_view(region, record);
    if (view)
        ndm_i_store_fetch(&region->store, ndm_i_record_offset(record), ndm_i_record_size(record));
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
    const ndm_i_record *record = ndm_i_live_record(region, slot);
    if (!record)
        return NULL;
    if (ndm_i_record_size(record) == 0) {
        *size = 0;
        return ndm_i_empty_view;
    }
    char *view;
    ndm_i_fork_bar();
    ndm_i_mapping *mapping =
        ndm_i_mapping_new_private(region->data.fd, ndm_i_record_offset(record), ndm_i_record_size(record), &view);
    const bool pinned = mapping && ndm_i_pin(region, ndm_i_record_link(record), mapping, view,
                                             ndm_i_record_size(record), false) == NDM_OK;
    ndm_i_mapping_unref(mapping); /* the view holds it */
    ndm_i_fork_let();
    if (!pinned)
        return NULL;
    ndm_i_store_fetch(&region->store, ndm_i_record_offset(record), ndm_i_record_size(record));
    *size = ndm_i_record_size(record);
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
        status = ndm_i_store_load(&region->store, ndm_i_record_offset(record), buffer, size);
    return status == NDM_OK ? (int64_t)size : status;
}

/* ---- pins: views, typed as bytes ------------------------------------------------------------------------ */

const uint8_t *ndm_region_pin(ndm_region *region, int64_t slot, uint64_t *size)
{
    uint64_t ignored;
    return (const uint8_t *)ndm_region_read(region, slot, size ? size : &ignored);
}

void ndm_region_unpin(const uint8_t *data) { ndm_view_release((const char *)data); }
