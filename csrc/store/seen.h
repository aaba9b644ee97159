/* What was seen in RAM lately.
 *
 * Asking the kernel whether a range is in RAM takes 300 ns, more than the rest of a view. What was found there, or was
 * fetched, is taken to be there for the rest of the second, unless something was dropped since. That is a hint: a range
 * that is gone all the same is read page by page, and one that was forgotten is asked about again.
 *
 * Owner only.
 */
#ifndef NDM_SEEN_H
#define NDM_SEEN_H

#include <stdbool.h>
#include <stdint.h>

enum { NDM_I_SEEN_ENTRIES = 16384 }; /* pages of the table that are not used cost nothing */

typedef struct {
    struct {
        uint64_t offset; /* where the range starts */
        uint64_t when;   /* of ndm_i_seen_moment() */
    } entries[NDM_I_SEEN_ENTRIES];
} ndm_i_seen;

/* This second, of those in which `drops` things have been dropped. */
uint64_t ndm_i_seen_moment(uint64_t drops);

bool ndm_i_seen_at(const ndm_i_seen *seen, uint64_t offset, uint64_t moment);

void ndm_i_seen_note(ndm_i_seen *seen, uint64_t offset, uint64_t moment);

#endif
