/* Sharing: what readers need to find a value, and the leases file that lets them keep one. */
#include "region/ledger.h"

#include "os/status.h"

#include <errno.h>

int ndm_region_allow_leases(ndm_region *region)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    if (ndm_i_leases_are_open(&region->leases))
        return ndm_i_leases_mend(&region->leases);
    if (!ndm_i_file_is_own(&region->data)) /* the next owner would refuse a leases file of another user */
        return (int)ndm_i_of_file(NDM_FILE_LEASES,
                                  ndm_i_fail_io(EPERM, "the process has changed its user since it opened the region: "
                                                       "share a value before that"));
    if ((status = ndm_i_leases_start(&region->leases, region->leases_path)) == NDM_OK)
        region->leases.incarnation = ndm_i_word(&ndm_i_slots_header(&region->slots)->incarnation);
    if (status == NDM_OK)
        atomic_store(&ndm_i_slots_header(&region->slots)->has_leases, 1);
    return status;
}

/* A reference leads to the files by their paths. */
static int check_names(const ndm_region *region)
{
    const ndm_i_file *files[] = {&region->data, &region->slots.table, &region->leases.file};
    for (int file = NDM_FILE_DATA; region->leases_path && file <= NDM_FILE_LEASES; file++)
        if (files[file]->fd >= 0 && !ndm_i_file_is_linked(files[file]))
            return (int)ndm_i_of_file(file, ndm_i_fail_io(ENOENT, "the file was removed while the region is open, and "
                                                                  "no reader could find it: the owner can still read "
                                                                  "its values"));
    return NDM_OK;
}

int ndm_region_share(ndm_region *region, int64_t slot, ndm_shared *out)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    const ndm_i_record *record = ndm_i_live_record(region, slot);
    if (!record)
        return ndm_last_error()->status;
    if ((status = check_names(region)) != NDM_OK)
        return status;
    *out = (ndm_shared){.data = region->data.fd,
                        .slots = region->slots.table.fd,
                        .leases = region->leases.file.fd,
                        .generation = ndm_i_record_generation(record),
                        .incarnation = ndm_i_word(&ndm_i_slots_header(&region->slots)->incarnation)};
    return NDM_OK;
}
