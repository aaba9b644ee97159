/* What open.c uses of recover.c: what an earlier owner left, its values or only what living readers lease of them. */
#ifndef NDM_RECOVER_H
#define NDM_RECOVER_H

#include "region/ledger.h"

/* Join the leases file that is there: readers may lease through it from now on, whether anything is shared or not. A
 * status if there may be one that the system does not let us use: what it keeps would be overwritten. */
int ndm_i_join_leases(ndm_region *region);

/* Take over the values of a table that was adopted, and what leases keep. NDM_ERR_IO with EUCLEAN if it is torn: then
 * nothing in the files has been changed. */
int ndm_i_recover(ndm_region *region);

/* The places that living readers of an earlier opening lease, in whole units within the file, in order and apart. Room
 * for NDM_I_LEASES. How many, or a status. */
int64_t ndm_i_leased_before(ndm_region *region, ndm_i_span *places);

/* Take extents for these places, in an empty region. Cannot fail after reserve_places(). */
int ndm_i_reserve_places(ndm_region *region, uint64_t count);
int ndm_i_keep_places(ndm_region *region, const ndm_i_span *places, uint64_t count);

#endif
