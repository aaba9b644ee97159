#include "os/status.h"

static _Thread_local ndm_error last;

const ndm_error *ndm_last_error(void) { return &last; }

int ndm_i_fail(int status, const char *message)
{
    last = (ndm_error){.status = status, .message = message};
    return status;
}

int ndm_i_fail_io(int os_errno, const char *message)
{
    last = (ndm_error){.status = NDM_ERR_IO, .os_errno = os_errno, .message = message};
    return NDM_ERR_IO;
}

int ndm_i_fail_again(ndm_error before)
{
    last = before;
    return before.status;
}

int ndm_i_fail_slot(int status, int64_t slot)
{
    last = (ndm_error){.status = status, .slot_known = 1, .slot = slot, .message = "the slot is not live"};
    return status;
}

int ndm_i_fail_capacity(uint64_t required, uint64_t limit)
{
    last = (ndm_error){.status = NDM_ERR_CAPACITY,
                       .required = required,
                       .limit = limit,
                       .message = "the region would grow past its max_capacity"};
    return NDM_ERR_CAPACITY;
}

int ndm_i_fail_budget(ndm_error details)
{
    last = details;
    return details.status;
}

int64_t ndm_i_of_slot(int64_t slot, int64_t result)
{
    if (result == NDM_ERR_NO_SLOT || result == NDM_ERR_FREED_SLOT || result == NDM_ERR_UNCOMMITTED ||
        result == NDM_ERR_STALE || result == NDM_ERR_WAIT) {
        last.slot_known = 1;
        last.slot = slot;
    }
    return result;
}

int64_t ndm_i_of_file(int file, int64_t result)
{
    if (result < 0)
        last.file = file;
    return result;
}

int64_t ndm_i_ended(int64_t result, const ndm_error *before)
{
    if (result >= 0)
        last = *before;
    return result;
}

void ndm_i_of_space(ndm_error space)
{
    last.space_known = 1;
    last.views = space.views;
    last.free_bytes = space.free_bytes;
    last.largest_free_bytes = space.largest_free_bytes;
    last.pinned_bytes = space.pinned_bytes;
    last.disk_free = space.disk_free;
}
