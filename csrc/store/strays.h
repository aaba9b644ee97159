/* Pages of large values that small ones beside them have mapped: forgotten once there are a few.
 *
 * Owner only. */
#ifndef NDM_STRAYS_H
#define NDM_STRAYS_H

#include "store/store.h"

/* Bytes of [offset, end), small, are touched through the mapping: note those of its 2 MiB that hold large values, too. */
void ndm_i_strays_note(ndm_i_store *store, uint64_t offset, uint64_t end);

static inline void ndm_i_strays_touched(ndm_i_store *store, uint64_t offset, uint64_t end)
{
    if (ndm_i_grains_hold_large(&store->grains, offset, end) && store->forget_from != UINT64_MAX)
        ndm_i_strays_note(store, offset, end);
}

#endif
