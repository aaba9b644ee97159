/* See limbo.h. */
#include "region/limbo.h"

#include "store/slots.h"

#include <assert.h>
#include <stdlib.h>

/* An extent that a lease keeps: that of a slot and generation; or, from before this owner, any lease of its bytes. */
struct ndm_i_leased {
    struct ndm_i_leased *next;
    uint32_t extent, slot, generation;
    unsigned unit_shift; /* where `slot` is NDM_I_NO_SLOT */
};

static void leave(ndm_i_limbo *limbo, uint32_t extent)
{
    ndm_i_extents_set_tag(limbo->extents, extent, NDM_I_NONE);
    limbo->units += ndm_i_extents_length(limbo->extents, extent);
}

static void come_home(ndm_i_limbo *limbo, uint32_t extent)
{
    const uint64_t length = ndm_i_extents_length(limbo->extents, extent);
    assert(limbo->units >= length && ndm_i_extents_tag(limbo->extents, extent) == NDM_I_NONE);
    limbo->units -= length;
    ndm_i_extents_release(limbo->extents, extent);
}

static bool note(ndm_i_limbo *limbo, uint32_t extent, uint32_t slot, uint32_t generation, unsigned unit_shift)
{
    struct ndm_i_leased *leased = malloc(sizeof *leased);
    if (!leased)
        return false;
    *leased = (struct ndm_i_leased){limbo->leased, extent, slot, generation, unit_shift};
    limbo->leased = leased;
    return true;
}

void ndm_i_limbo_add_kept(ndm_i_limbo *limbo, uint32_t extent, uint32_t slot, uint32_t generation)
{
    if (ndm_i_leases_has(limbo->leases, slot, generation)) {
        /* Without memory to note it, nobody gives the extent back until the region is closed: better to lose its space
         * than to let a reader see other bytes. */
        note(limbo, extent, slot, generation, 0);
        leave(limbo, extent);
    } else if (ndm_i_pins_orphan(limbo->home, extent)) {
        leave(limbo, extent);
    } else {
        ndm_i_extents_release(limbo->extents, extent);
    }
}

bool ndm_i_limbo_add_leased(ndm_i_limbo *limbo, uint32_t extent, unsigned unit_shift)
{
    if (!note(limbo, extent, NDM_I_NO_SLOT, 0, unit_shift))
        return false;
    leave(limbo, extent);
    return true;
}

static bool is_leased(const ndm_i_limbo *limbo, const struct ndm_i_leased *leased)
{
    if (leased->slot != NDM_I_NO_SLOT)
        return ndm_i_leases_has(limbo->leases, leased->slot, leased->generation);
    const ndm_i_span bytes = {ndm_i_extents_offset(limbo->extents, leased->extent) << leased->unit_shift,
                              ndm_i_extents_length(limbo->extents, leased->extent) << leased->unit_shift};
    return ndm_i_leases_touch(limbo->leases, bytes);
}

static bool collect_leased(ndm_i_limbo *limbo)
{
    bool came = false;
    for (struct ndm_i_leased **link = &limbo->leased; *link;) {
        struct ndm_i_leased *leased = *link;
        if (is_leased(limbo, leased)) {
            link = &leased->next;
            continue;
        }
        *link = leased->next;
        if (!ndm_i_pins_orphan(limbo->home, leased->extent)) { /* the owner's own views keep it, too */
            come_home(limbo, leased->extent);
            came = true;
        }
        free(leased);
    }
    return came;
}

bool ndm_i_limbo_collect_ended(ndm_i_limbo *limbo)
{
    uint32_t extent;
    bool came = false;
    while (ndm_i_pins_collect(limbo->home, &extent)) {
        come_home(limbo, extent);
        came = true;
    }
    if (limbo->leased && ndm_i_leases_news(limbo->leases) && collect_leased(limbo))
        came = true;
    return came;
}

/* A process that died has reported no release. */
bool ndm_i_limbo_reap(ndm_i_limbo *limbo)
{
    ndm_i_leases_reap(limbo->leases);
    const bool came = ndm_i_limbo_collect(limbo);
    return (limbo->leased && collect_leased(limbo)) || came;
}

void ndm_i_limbo_forget(ndm_i_limbo *limbo)
{
    while (limbo->leased) {
        struct ndm_i_leased *leased = limbo->leased;
        limbo->leased = leased->next;
        free(leased);
    }
}
