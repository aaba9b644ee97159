/* Whole grains made ready for small stores: one read of 512 KiB takes as long as eight reads of a page, mapping a grain anew as
 * long as two or three faults, and both serve thousands of small values.
 *
 * Owner only.
 */
#ifndef NDM_WARM_H
#define NDM_WARM_H

#include "store/watch.h"

/* From this size on a value takes pages of its own, and fetching its neighbours does not help it. */
#define NDM_I_NO_NEIGHBOUR ((uint64_t)64 << 10)

/* Would a small value be stored to the grain at `offset` page by page? It holds values, and was dropped from RAM, or comes
 * from an earlier owner. */
static inline bool ndm_i_store_is_cold(const ndm_i_store *store, uint64_t offset)
{
    const uint8_t state = ndm_i_grain_state(&store->grains, offset / NDM_I_GRAIN);
    return state == NDM_I_DROPPED || state == NDM_I_PARTIAL;
}

/* Warm the grain at `offset`: a cold one is read in one go and becomes READY, one that may have been written back is mapped
 * anew. What is not in RAM is read only if that is `worth` it. false: the grain is cold; the error is not set. */
bool ndm_i_store_warm(ndm_i_store *store, uint64_t offset, bool worth);

/* Read the cold grains of [offset, offset + size), which is about to be read, in one go. What was asked for last is not
 * asked for again, until `store->asked` is 0. */
void ndm_i_store_fetch_around(ndm_i_store *store, uint64_t offset, uint64_t size);

#endif
