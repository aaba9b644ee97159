/* Limbo: extents whose values are freed, but viewed or leased. Each comes home, to the free space, when the last of what
 * keeps it has ended. It knows extents, pins and leases; what a value is, it does not know.
 *
 * Whether a value is leased costs a system call (leases.h). So where readers may lease, the extent of a freed value waits at
 * the door until some more have come, and the owner asks once for all of them. Sooner where the file would have to grow, and
 * where figures are asked for, or space is gathered. In the same way the owner looks now and then whether leases have ended.
 *
 * All functions are the owner's. Those that give a bool tell whether something came home.
 */
#ifndef NDM_LIMBO_H
#define NDM_LIMBO_H

#include "store/extents.h"
#include "store/leases.h"
#include "store/pins.h"

enum { NDM_I_WAITING = 64 };
#define NDM_I_WAITING_BYTES ((uint64_t)256 << 10) /* no more than that waits: a system call costs less than writing so much */

/* An extent that was freed, and the slot and generation of its value. */
typedef struct {
    uint32_t extent, slot, generation;
} ndm_i_freed;

typedef struct {
    ndm_i_extents *extents;
    ndm_i_home *home;
    ndm_i_leases *leases;
    const unsigned *unit_shift;  /* one unit is 1 << that many bytes */
    struct ndm_i_leased *leased; /* those that leases keep */
    struct ndm_i_leased *spare;  /* memory for more */
    uint64_t leased_count;
    uint64_t rest;               /* so many verbs go by before the owner looks whether they still do */
    uint64_t units;              /* in limbo: freed, and kept */
    ndm_i_freed waiting[NDM_I_WAITING]; /* freed, and perhaps leased: at the door */
    uint64_t waiting_count, waiting_units;
} ndm_i_limbo;

/* The extent of a freed value, where readers may lease. */
void ndm_i_limbo_wait(ndm_i_limbo *limbo, ndm_i_freed freed);

/* The extent of a freed value, where it can only be viewed. */
void ndm_i_limbo_add_viewed(ndm_i_limbo *limbo, uint32_t extent);

/* The extent of a freed value, which had this slot and generation: free at once if nothing can keep it. */
static inline void ndm_i_limbo_add(ndm_i_limbo *limbo, uint32_t extent, uint32_t slot, uint32_t generation)
{
    if (ndm_i_leases_are_open(limbo->leases))
        ndm_i_limbo_wait(limbo, (ndm_i_freed){extent, slot, generation});
    else if (ndm_i_pins_any(limbo->home))
        ndm_i_limbo_add_viewed(limbo, extent);
    else
        ndm_i_extents_release(limbo->extents, extent);
}

/* An extent that leases of an earlier owner's time keep: any lease of its bytes does. false: no memory. */
bool ndm_i_limbo_add_leased(ndm_i_limbo *limbo, uint32_t extent);

/* Make sure that the next `count` add_leased()s need no memory; what was reserved and is left over goes with drop_spare(). */
bool ndm_i_limbo_reserve(ndm_i_limbo *limbo, uint64_t count);
void ndm_i_limbo_drop_spare(ndm_i_limbo *limbo);

/* What ended since comes home: views that were dropped; now and then, leases that were released. */
bool ndm_i_limbo_collect_ended(ndm_i_limbo *limbo);

static inline bool ndm_i_limbo_collect(ndm_i_limbo *limbo)
{
    return (ndm_i_pins_have_returned(limbo->home) || limbo->leased) && ndm_i_limbo_collect_ended(limbo);
}

/* All that nothing keeps comes home: nobody waits, and leases that have ended, with their processes too, are known. */
void ndm_i_limbo_settle(ndm_i_limbo *limbo);

/* May settling bring anything home that is not in the books yet? */
static inline bool ndm_i_limbo_is_unsettled(const ndm_i_limbo *limbo) { return limbo->leased || limbo->waiting_count > 0; }

/* Forget what leases keep: the region is closing. */
void ndm_i_limbo_forget(ndm_i_limbo *limbo);

#endif
