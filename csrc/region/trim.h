/* What compact.c uses of trim.c. */
#ifndef NDM_TRIM_H
#define NDM_TRIM_H

#include "region/ledger.h"

/* Let go of free space at the end; used_bytes follows. */
void ndm_i_lower_mark(ndm_region *region);

#endif
