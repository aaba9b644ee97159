/* Opening a region afresh: what stands in its files goes, but for bytes that living readers lease. */
#ifndef NDM_ANEW_H
#define NDM_ANEW_H

#include "region/ledger.h"

/* The files are open and locked. Everything that can be refused comes first: until then the values of an earlier region
 * can still be recovered. */
int ndm_i_start_anew(ndm_region *region, const ndm_options *options);

/* The store of a data file that has been started. */
int ndm_i_start_store(ndm_region *region, const ndm_options *options);

#endif
