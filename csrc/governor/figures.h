/* The checker, which who opens a file needs, too. */
#ifndef NDM_GOVERNOR_FIGURES_H
#define NDM_GOVERNOR_FIGURES_H

#include "governor/governor.h"

/* How many invariants are broken. With the lock. */
int64_t ndm_i_books_check(const ndm_governor *governor);

#endif
