/* Governors by number, for code that cannot hold a pointer (numba): ndm_g_*. Each is the verb of the same name. */
#include "nodedb_mem.h"

#include "governor/number.h"
#include "os/status.h"

typedef int verb(ndm_governor *governor, int64_t engine, uint64_t size);

static inline int call(verb *what, uint64_t handle, int64_t engine, uint64_t size)
{
    ndm_governor *governor = ndm_i_number_begin(handle);
    if (!governor)
        return NDM_ERR_CLOSED;
    const int status = what(governor, engine, size);
    ndm_i_number_end(handle);
    return status;
}

int ndm_g_reserve(uint64_t handle, int64_t engine, uint64_t size) { return call(ndm_governor_reserve, handle, engine, size); }

int ndm_g_release(uint64_t handle, int64_t engine, uint64_t size) { return call(ndm_governor_release, handle, engine, size); }

int ndm_g_charge(uint64_t handle, int64_t engine, uint64_t size) { return call(ndm_governor_charge, handle, engine, size); }

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
