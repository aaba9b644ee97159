/* Regions by number, for code that cannot hold a pointer (numba) or does not know how long a region lives: ndm_h_*. Each is
 * the verb of the same name, between the begin and the end of a call by handle (store/handles.h). */
#include "nodedb_mem.h"

#include "os/status.h"
#include "region/ledger.h"
#include "store/handles.h"

/* The region was destroyed on another thread meanwhile: that is finished here. */
static void end(const ndm_i_call *call)
{
    if (!ndm_i_call_end(call))
        ndm_region_destroy(call->object);
}

uint64_t ndm_region_handle(ndm_region *region)
{
    if (ndm_i_enter(region) != NDM_OK)
        return 0;
    NDM_I_LEAVES(region);
    uint64_t handle = atomic_load(&region->handle);
    if (handle != 0)
        return handle;
    if ((handle = ndm_i_handle_new(region, ndm_i_owner_holder(&region->owner), region->owner.process)) == 0)
        ndm_i_fail(NDM_ERR_MEMORY, "no memory for a handle");
    atomic_store(&region->handle, handle);
    return handle;
}

ndm_region *ndm_h_region(uint64_t handle)
{
    ndm_i_call call;
    if (ndm_i_call_begin(handle, &call) != NDM_OK)
        return NULL;
    ndm_region *region = call.object;
    if (ndm_i_region_is_closed(region)) {
        ndm_i_fail(NDM_ERR_CLOSED, "the handle's region is closed");
        region = NULL;
    }
    end(&call);
    return region;
}

int64_t ndm_h_write(uint64_t handle, const uint8_t *data, uint64_t size, int64_t engine)
{
    ndm_i_call call;
    const int status = ndm_i_call_begin(handle, &call);
    if (status != NDM_OK)
        return status;
    const int64_t slot = ndm_region_write(call.object, data, size, engine);
    end(&call);
    return slot;
}

int64_t ndm_h_read_into(uint64_t handle, int64_t slot, uint8_t *buffer, uint64_t capacity)
{
    ndm_i_call call;
    const int status = ndm_i_call_begin(handle, &call);
    if (status != NDM_OK)
        return status;
    const int64_t size = ndm_region_read_into(call.object, slot, buffer, capacity);
    end(&call);
    return ndm_i_of_slot(slot, size);
}

const uint8_t *ndm_h_pin(uint64_t handle, int64_t slot, uint64_t *size)
{
    ndm_i_call call;
    if (ndm_i_call_begin(handle, &call) != NDM_OK)
        return NULL;
    const uint8_t *data = ndm_region_pin(call.object, slot, size);
    if (!data)
        ndm_i_of_slot(slot, ndm_last_error()->status);
    end(&call);
    return data;
}

int ndm_h_free(uint64_t handle, int64_t slot)
{
    ndm_i_call call;
    int status = ndm_i_call_begin(handle, &call);
    if (status != NDM_OK)
        return status;
    status = ndm_region_free(call.object, slot);
    end(&call);
    return (int)ndm_i_of_slot(slot, status);
}

int ndm_h_contains(uint64_t handle, int64_t slot)
{
    ndm_i_call call;
    int status = ndm_i_call_begin(handle, &call);
    if (status != NDM_OK)
        return status;
    status = ndm_region_contains(call.object, slot);
    end(&call);
    return status;
}

static int64_t size_of(ndm_region *region, int64_t slot)
{
    const int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    const ndm_i_record *record = ndm_i_live_record(region, slot);
    return record ? (int64_t)ndm_i_record_size(record) : ndm_last_error()->status;
}

int64_t ndm_h_size(uint64_t handle, int64_t slot)
{
    ndm_i_call call;
    const int status = ndm_i_call_begin(handle, &call);
    if (status != NDM_OK)
        return status;
    const int64_t size = size_of(call.object, slot);
    end(&call);
    return ndm_i_of_slot(slot, size);
}
