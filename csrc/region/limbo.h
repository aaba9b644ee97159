/* Limbo: extents whose values are freed, but viewed or leased. Each comes home, to the free space, when the last of what
 * keeps it has ended. It knows extents, pins and leases; what a value is, it does not know.
 *
 * All functions are the owner's. Those that give a bool tell whether something came home.
 */
#ifndef NDM_LIMBO_H
#define NDM_LIMBO_H

#include "store/extents.h"
#include "store/leases.h"
#include "store/pins.h"

typedef struct {
    ndm_i_extents *extents;
    ndm_i_home *home;
    ndm_i_leases *leases;
    struct ndm_i_leased *leased; /* those that leases keep */
    struct ndm_i_leased *spare;  /* memory for more */
    uint64_t units;              /* in limbo: freed, and waiting */
} ndm_i_limbo;

/* The extent of a freed value, which had this slot and generation, where something may keep it. */
void ndm_i_limbo_add_kept(ndm_i_limbo *limbo, uint32_t extent, uint32_t slot, uint32_t generation);

/* The extent of a freed value: free at once if nothing keeps it. */
static inline void ndm_i_limbo_add(ndm_i_limbo *limbo, uint32_t extent, uint32_t slot, uint32_t generation)
{
    if (ndm_i_pins_any(limbo->home) || ndm_i_leases_any(limbo->leases))
        ndm_i_limbo_add_kept(limbo, extent, slot, generation);
    else
        ndm_i_extents_release(limbo->extents, extent);
}

/* An extent that leases of an earlier owner's time keep: any lease of its bytes does. `unit_shift`: one unit is 1 <<
 * unit_shift bytes. false: no memory. */
bool ndm_i_limbo_add_leased(ndm_i_limbo *limbo, uint32_t extent, unsigned unit_shift);

/* Make sure that the next `count` add_leased()s need no memory; what was reserved and is left over goes with drop_spare(). */
bool ndm_i_limbo_reserve(ndm_i_limbo *limbo, uint64_t count);
void ndm_i_limbo_drop_spare(ndm_i_limbo *limbo);

/* What ended since comes home: views that were dropped, leases that were released. */
bool ndm_i_limbo_collect_ended(ndm_i_limbo *limbo);

static inline bool ndm_i_limbo_collect(ndm_i_limbo *limbo)
{
    return (ndm_i_pins_have_returned(limbo->home) || limbo->leased) && ndm_i_limbo_collect_ended(limbo);
}

/* The same, and the leases of dead processes end. */
bool ndm_i_limbo_reap(ndm_i_limbo *limbo);

/* Forget what leases keep: the region is closing. */
void ndm_i_limbo_forget(ndm_i_limbo *limbo);

#endif
