/* Sums over the rows, which other rooms' verbs need, too. */
#ifndef NDM_GOVERNOR_FIGURES_H
#define NDM_GOVERNOR_FIGURES_H

#include "governor/governor.h"

/* Bytes reserved now, of an engine in all rows; and of all engines. */
uint64_t ndm_i_used(const ndm_governor *governor, uint32_t engine);
uint64_t ndm_i_used_by_all(const ndm_governor *governor);

/* The highest sums: a row alone knows its own. With the lock. */
void ndm_i_note_peaks(ndm_governor *governor, uint32_t engine);

/* How many invariants are broken. With the lock. */
int64_t ndm_i_books_check(const ndm_governor *governor);

#endif
