/* The checker of extents.h. */
#ifndef NDM_EXTENTS_CHECK_H
#define NDM_EXTENTS_CHECK_H

#include "store/extents.h"

/* How many invariants are broken. 0 in a sound structure. Linear. */
uint64_t ndm_i_extents_check(const ndm_i_extents *extents);

#endif
