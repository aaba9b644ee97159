/* Regions by number, for callers that cannot be trusted to know whether a region still lives.
 *
 * A handle is an index into a table and a generation. The table's entries are never freed, so that any number may be
 * looked up; an entry's generation grows when its region is closed, and an old handle no longer fits. All of it is
 * lock-free: a forked child finds the table whole, and a wrong thread costs the owner nothing.
 *
 * An entry's state is its generation and three flags:
 *   LIVE    it has a region
 *   BUSY    the owner is inside a call by handle; only the owner sets and clears it
 *   DOOMED  the region was destroyed meanwhile: the owner finishes that when its call ends
 */
#ifndef NDM_HANDLE_H
#define NDM_HANDLE_H

#include "nodedb_mem.h"

#include <stdbool.h>

/* The region is being closed or destroyed: its handle is stale from now on. false: the owner is inside a call by handle
 * on another thread, and will call ndm_region_destroy() at its end. */
bool ndm_i_handle_retire(ndm_region *region);

#endif
