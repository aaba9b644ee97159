/* Governors by number, for code that cannot hold a pointer (numba): ndm_g_*. Each is the verb of the same name. */
#include "nodedb_mem.h"

#include "governor/number.h"
#include "os/status.h"

int ndm_g_reserve(uint64_t handle, int64_t engine, uint64_t size)
{
    ndm_governor *governor = ndm_i_number_begin(handle);
    if (!governor)
        return NDM_ERR_CLOSED;
    const int status = ndm_governor_reserve(governor, engine, size);
    ndm_i_number_end(handle);
    return status;
}

int ndm_g_release(uint64_t handle, int64_t engine, uint64_t size)
{
    ndm_governor *governor = ndm_i_number_begin(handle);
    if (!governor)
        return NDM_ERR_CLOSED;
    const int status = ndm_governor_release(governor, engine, size);
    ndm_i_number_end(handle);
    return status;
}

int ndm_g_charge(uint64_t handle, int64_t engine, uint64_t size)
{
    ndm_governor *governor = ndm_i_number_begin(handle);
    if (!governor)
        return NDM_ERR_CLOSED;
    const int status = ndm_governor_charge(governor, engine, size);
    ndm_i_number_end(handle);
    return status;
}

int ndm_g_pressure(uint64_t handle, int64_t engine)
{
    ndm_governor *governor = ndm_i_number_begin(handle);
    if (!governor)
        return NDM_ERR_CLOSED;
    const int status = ndm_governor_pressure(governor, engine);
    ndm_i_number_end(handle);
    return status;
}

int64_t ndm_g_allocated(uint64_t handle, int64_t engine)
{
    ndm_governor *governor = ndm_i_number_begin(handle);
    if (!governor)
        return NDM_ERR_CLOSED;
    const int64_t bytes = ndm_governor_allocated(governor, engine);
    ndm_i_number_end(handle);
    return bytes;
}
