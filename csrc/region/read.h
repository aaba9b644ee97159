/* What other verbs use of read.c. */
#ifndef NDM_READ_H
#define NDM_READ_H

#include "region/ledger.h"

/* A view of a live value, pinned. NULL, with the error set, if there is no memory. */
const char *ndm_i_add_view(ndm_region *region, const ndm_i_record *record);

/* The same, about to be read: what is not in RAM is fetched. */
const char *ndm_i_view_value(ndm_region *region, const ndm_i_record *record);

#endif
