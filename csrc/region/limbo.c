/* See limbo.h. */
#include "region/limbo.h"

#include "store/slots.h"

#include <assert.h>
#include <stdlib.h>

/* An extent that a lease keeps: that of a slot and generation; or, where that is NDM_I_NO_SLOT, any lease of
 * its bytes: it is from before this owner. */
struct ndm_i_leased {
    struct ndm_i_leased *next;
    ndm_i_freed freed;
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

static bool note(ndm_i_limbo *limbo, ndm_i_freed freed)
{
    struct ndm_i_leased *leased = limbo->spare;
    if (leased)
        limbo->spare = leased->next;
    else if (!(leased = malloc(sizeof *leased)))
        return false;
    *leased = (struct ndm_i_leased){limbo->leased, freed};
    limbo->leased = leased;
    limbo->leased_count++;
    return true;
}

void ndm_i_limbo_add_viewed(ndm_i_limbo *limbo, uint32_t extent)
{
    if (ndm_i_pins_orphan(limbo->home, extent))
        leave(limbo, extent);
    else
        ndm_i_extents_release(limbo->extents, extent);
}

bool ndm_i_limbo_add_leased(ndm_i_limbo *limbo, uint32_t extent)
{
    if (!note(limbo, (ndm_i_freed){extent, NDM_I_NO_SLOT, 0}))
        return false;
    leave(limbo, extent);
    return true;
}

bool ndm_i_limbo_reserve(ndm_i_limbo *limbo, uint64_t count)
{
    while (count-- > 0) {
        struct ndm_i_leased *spare = malloc(sizeof *spare);
        if (!spare)
            return false;
        spare->next = limbo->spare;
        limbo->spare = spare;
    }
    return true;
}

static void free_all(struct ndm_i_leased **list)
{
    while (*list) {
        struct ndm_i_leased *leased = *list;
        *list = leased->next;
        free(leased);
    }
}

void ndm_i_limbo_drop_spare(ndm_i_limbo *limbo) { free_all(&limbo->spare); }

/* ---- at the door ---------------------------------------------------------------------------------------- */

/* All who wait go on, by what the owner noted when it looked round: they were freed before. */
static void let_in(ndm_i_limbo *limbo)
{
    for (uint64_t i = 0; i < limbo->waiting_count; i++) {
        const ndm_i_freed freed = limbo->waiting[i];
        if (!ndm_i_leases_noted(limbo->leases, freed.slot, freed.generation)) {
            ndm_i_limbo_add_viewed(limbo, freed.extent);
            continue;
        }
        /* Without memory to note it, nobody gives the extent back until the region is closed: better to lose its space
         * than to let a reader see other bytes. */
        note(limbo, freed);
        leave(limbo, freed.extent);
    }
    limbo->waiting_count = limbo->waiting_units = 0;
}

void ndm_i_limbo_wait(ndm_i_limbo *limbo, ndm_i_freed freed)
{
    limbo->waiting[limbo->waiting_count++] = freed;
    limbo->waiting_units += ndm_i_extents_length(limbo->extents, freed.extent);
    ndm_i_extents_set_tag(limbo->extents, freed.extent, NDM_I_NONE);
    if (limbo->waiting_count == NDM_I_WAITING || limbo->waiting_units << *limbo->unit_shift >= NDM_I_WAITING_BYTES) {
        ndm_i_leases_look_round(limbo->leases);
        let_in(limbo);
    }
}

/* ---- what leases keep ----------------------------------------------------------------------------------- */

static bool is_leased(const ndm_i_limbo *limbo, ndm_i_freed freed)
{
    if (freed.slot != NDM_I_NO_SLOT)
        return ndm_i_leases_noted(limbo->leases, freed.slot, freed.generation);
    const unsigned shift = *limbo->unit_shift;
    const ndm_i_span bytes = {ndm_i_extents_offset(limbo->extents, freed.extent) << shift,
                              ndm_i_extents_length(limbo->extents, freed.extent) << shift};
    return ndm_i_leases_touched(limbo->leases, bytes);
}

/* The leases that have ended, by what the owner noted when it looked round. */
static bool collect_leased(ndm_i_limbo *limbo)
{
    bool came = false;
    for (struct ndm_i_leased **link = &limbo->leased; *link;) {
        struct ndm_i_leased *leased = *link;
        if (is_leased(limbo, leased->freed)) {
            link = &leased->next;
            continue;
        }
        *link = leased->next;
        limbo->leased_count--;
        if (!ndm_i_pins_orphan(limbo->home, leased->freed.extent)) { /* the owner's own views keep it, too */
            come_home(limbo, leased->freed.extent);
            came = true;
        }
        free(leased);
    }
    return came;
}

static bool collect_viewed(ndm_i_limbo *limbo)
{
    uint32_t extent;
    bool came = false;
    while (ndm_i_pins_collect(limbo->home, &extent)) {
        come_home(limbo, extent);
        came = true;
    }
    return came;
}

bool ndm_i_limbo_collect_ended(ndm_i_limbo *limbo)
{
    const bool came = collect_viewed(limbo);
    if (!limbo->leased || limbo->rest-- > 0)
        return came;
    /* The more extents are kept, the longer it takes to go through them: the price of a verb stays the same. */
    limbo->rest = NDM_I_WAITING + limbo->leased_count;
    ndm_i_leases_look_round(limbo->leases);
    return collect_leased(limbo) || came;
}

void ndm_i_limbo_settle(ndm_i_limbo *limbo)
{
    collect_viewed(limbo);
    if (!ndm_i_limbo_is_unsettled(limbo))
        return;
    ndm_i_leases_look_round(limbo->leases);
    collect_leased(limbo);
    let_in(limbo);
}

void ndm_i_limbo_forget(ndm_i_limbo *limbo)
{
    free_all(&limbo->leased);
    ndm_i_limbo_drop_spare(limbo);
    limbo->leased_count = limbo->waiting_count = limbo->waiting_units = 0;
}
