/* The lock's other half: what a death inside it may have left undone. */
#ifndef NDM_GOVERNOR_LOCK_H
#define NDM_GOVERNOR_LOCK_H

#include "governor/governor.h"

/* The byte of the file that stands for a row's claim; that of the lock itself is 0. */
static inline uint64_t ndm_i_claim_byte(uint32_t row) { return 1 + (uint64_t)row; }

/* Add the totals up anew, from the rows. Locked. */
void ndm_i_books_recount(ndm_governor *governor);

#endif
