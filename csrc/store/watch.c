/* See watch.h. */
#include "store/watch.h"

#include <string.h>

/* One store of SELDOM is watched while there are no faults: 2 ns a store. After a fault MEANWHILE of them are, which takes as
 * long as the fault. A grain that was never mapped faults once, so a few faults mean nothing. */
enum { SELDOM = 512, MEANWHILE = 64, MANY = 16 };

static void begin_round(ndm_i_store *store)
{
    store->faults = 0;
    if (++store->round == 0) { /* numbers begin anew: no grain may have this one */
        memset(store->grains.rounds, 0, store->grains.room);
        store->round = 1;
    }
}

void ndm_i_watch_note(ndm_i_store *store, uint64_t before)
{
    if (ndm_i_mapping_faults() != before) {
        store->watched = MEANWHILE;
        if (++store->faults == MANY)
            begin_round(store);
    } else if (store->watched > 0) {
        store->watched--;
    } else {
        store->unwatched = SELDOM;
        store->faults = 0;
    }
}
