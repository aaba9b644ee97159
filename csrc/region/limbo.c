/* Freed extents that are kept: for a view of the owner's, or for a reader's lease. */
#include "region/ledger.h"

#include "os/status.h"

#include <stdlib.h>

/* A freed extent that a lease keeps: that of a slot and generation; or, of a time before this owner's, any that touches
 * its bytes. */
struct ndm_i_leased {
    struct ndm_i_leased *next;
    uint32_t extent, slot, generation;
};

void ndm_i_orphan_leaves(ndm_region *region, uint32_t extent)
{
    ndm_i_extents_set_tag(&region->extents, extent, NDM_I_NONE);
    region->pinned_bytes += ndm_i_extents_length(&region->extents, extent) << region->unit_shift;
}

void ndm_i_orphan_returns(ndm_region *region, uint32_t extent)
{
    region->pinned_bytes -= ndm_i_extents_length(&region->extents, extent) << region->unit_shift;
    ndm_i_extents_release(&region->extents, extent);
    ndm_i_publish(region);
}

bool ndm_i_leased_keep(ndm_region *region, uint32_t extent, uint32_t slot, uint32_t generation)
{
    struct ndm_i_leased *leased = malloc(sizeof *leased);
    if (!leased)
        return false;
    *leased = (struct ndm_i_leased){region->leased, extent, slot, generation};
    region->leased = leased;
    return true;
}

static bool is_leased(const ndm_region *region, const struct ndm_i_leased *leased)
{
    if (leased->slot != NDM_I_NO_SLOT)
        return ndm_i_leases_has(&region->leases, leased->slot, leased->generation);
    const ndm_i_span bytes = {ndm_i_extents_offset(&region->extents, leased->extent) << region->unit_shift,
                              ndm_i_extents_length(&region->extents, leased->extent) << region->unit_shift};
    return ndm_i_leases_touch(&region->leases, bytes);
}

void ndm_i_leased_collect(ndm_region *region, bool reap)
{
    if (reap)
        ndm_i_leases_reap(&region->leases);
    if (!region->leased || !ndm_i_leases_news(&region->leases))
        return;
    for (struct ndm_i_leased **link = &region->leased; *link;) {
        struct ndm_i_leased *leased = *link;
        if (is_leased(region, leased)) {
            link = &leased->next;
            continue;
        }
        *link = leased->next;
        if (!ndm_i_views_orphan(&region->home, leased->extent)) /* the owner's own views keep it, too */
            ndm_i_orphan_returns(region, leased->extent);
        free(leased);
    }
}

void ndm_i_leased_forget(ndm_region *region)
{
    while (region->leased) {
        struct ndm_i_leased *leased = region->leased;
        region->leased = leased->next;
        free(leased);
    }
}
