/* Sharing: what readers need to find a value, and the leases file that lets them keep one. */
#include "region/ledger.h"

#include "os/status.h"

int ndm_region_allow_leases(ndm_region *region)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    if (ndm_i_leases_are_open(&region->leases))
        return ndm_i_leases_mend(&region->leases);
    if ((status = ndm_i_leases_start(&region->leases, region->leases_path)) == NDM_OK)
        region->leases.incarnation = ndm_i_word(&ndm_i_slots_header(&region->slots)->incarnation);
    return status;
}

int ndm_region_share(ndm_region *region, int64_t slot, ndm_shared *out)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    const ndm_i_record *record = ndm_i_live_record(region, slot);
    if (!record)
        return ndm_last_error()->status;
    *out = (ndm_shared){.data = region->data.fd,
                        .slots = region->slots.table.fd,
                        .leases = region->leases.file.fd,
                        .generation = ndm_i_record_generation(record),
                        .incarnation = ndm_i_word(&ndm_i_slots_header(&region->slots)->incarnation)};
    return NDM_OK;
}
