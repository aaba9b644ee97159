#include "status.h"

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

int ndm_i_fail_slot(int status, int64_t slot)
{
    last = (ndm_error){.status = status, .slot = slot, .message = "a slot of the batch is not live"};
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
