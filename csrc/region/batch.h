/* What other verbs use of batch.c. */
#ifndef NDM_BATCH_H
#define NDM_BATCH_H

#include "region/ledger.h"

/* Are the slots all live, and none named twice if `once`? A status that names the first that is not. */
int ndm_i_check_slots(ndm_region *region, const int64_t *slots, uint64_t count, bool once);

#endif
