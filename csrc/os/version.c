/* Which library this is, and for whom it is good. */
#include "os/status.h"

const char *ndm_version(void) { return NDM_VERSION; }

int64_t ndm_abi_version(void) { return NDM_ABI_VERSION; }

int ndm_check_abi(int64_t abi, int64_t version)
{
    if (abi != NDM_ABI_VERSION)
        return ndm_i_fail(NDM_ERR_VERSION, "libnodedb_mem has another ABI than the header of the caller");
    if (version > NDM_VERSION_NUMBER)
        return ndm_i_fail(NDM_ERR_VERSION, "libnodedb_mem is older than the header of the caller");
    return NDM_OK;
}
