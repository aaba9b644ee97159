/* Small stores, watched for page faults.
 *
 * When the kernel writes dirty pages back, it takes the right to write to them from the mapping. The next store to each of
 * them faults, and the file system then looks at every block of the page's folio. Where a grain is one folio that takes 20 to
 * 40 us, a thousand times the store; pwrite() looks at as many blocks (benchmarks/native/write_paths.c). So a grain that has
 * been written back is mapped anew as a whole (warm.h), for the price of two faults.
 *
 * Nobody says that pages were written back. To ask for the count of faults takes 0.4 us, a store 0.03. So one store among
 * many is watched, and while there are faults, all of them. A number of faults begins a new round: from then on every grain
 * is taken for written back until it has been mapped anew.
 *
 * Owner only.
 */
#ifndef NDM_WATCH_H
#define NDM_WATCH_H

#include "store/store.h"

/* Before and after a store through the mapping to READY grains. */
static inline uint64_t ndm_i_watch_begin(ndm_i_store *store)
{
    if (store->unwatched == 0)
        return ndm_i_mapping_faults() + 1;
    store->unwatched--;
    return 0;
}

void ndm_i_watch_note(ndm_i_store *store, uint64_t before);

static inline void ndm_i_watch_end(ndm_i_store *store, uint64_t before)
{
    if (before > 0)
        ndm_i_watch_note(store, before - 1);
}

/* May the grain at `offset` have been written back since it was mapped? */
static inline bool ndm_i_is_stale(const ndm_i_store *store, uint64_t offset)
{
    return store->grains.rounds[offset / NDM_I_GRAIN] != store->round;
}

#endif
