/* The loops of native_calls.py, as a shared object: this file is valid as C and as C++. Each returns 0 or the status of
 * the call that failed. */
#include <nodedb_mem.h>

#ifdef __cplusplus
extern "C" {
#endif

int64_t write_direct(uint64_t handle, const uint8_t *data, uint64_t size, uint64_t count, int64_t *slots)
{
    ndm_region *region = ndm_h_region(handle);
    for (uint64_t i = 0; i < count; i++)
        if ((slots[i] = ndm_region_write(region, data, size, 0)) < 0)
            return slots[i];
    return 0;
}

int64_t write_by_handle(uint64_t handle, const uint8_t *data, uint64_t size, uint64_t count, int64_t *slots)
{
    for (uint64_t i = 0; i < count; i++)
        if ((slots[i] = ndm_h_write(handle, data, size, 0)) < 0)
            return slots[i];
    return 0;
}

int64_t copy_direct(uint64_t handle, uint8_t *buffer, uint64_t size, uint64_t count, const int64_t *slots)
{
    ndm_region *region = ndm_h_region(handle);
    for (uint64_t i = 0; i < count; i++) {
        const int64_t status = ndm_region_read_into(region, slots[i], buffer, size);
        if (status < 0)
            return status;
    }
    return 0;
}

int64_t copy_by_handle(uint64_t handle, uint8_t *buffer, uint64_t size, uint64_t count, const int64_t *slots)
{
    for (uint64_t i = 0; i < count; i++) {
        const int64_t status = ndm_h_read_into(handle, slots[i], buffer, size);
        if (status < 0)
            return status;
    }
    return 0;
}

int64_t view_direct(uint64_t handle, uint8_t *first, uint64_t size, uint64_t count, const int64_t *slots)
{
    ndm_region *region = ndm_h_region(handle);
    for (uint64_t i = 0; i < count; i++) {
        const uint8_t *data = ndm_region_pin(region, slots[i], &size);
        if (!data)
            return ndm_last_error()->status;
        *first = (uint8_t)(*first + data[0]);
        ndm_region_unpin(data);
    }
    return 0;
}

int64_t view_by_handle(uint64_t handle, uint8_t *first, uint64_t size, uint64_t count, const int64_t *slots)
{
    for (uint64_t i = 0; i < count; i++) {
        const uint8_t *data = ndm_h_pin(handle, slots[i], &size);
        if (!data)
            return ndm_last_error()->status;
        *first = (uint8_t)(*first + data[0]);
        ndm_region_unpin(data);
    }
    return 0;
}

#ifdef __cplusplus
}
#endif
