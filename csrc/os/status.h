/* How a call fails: a status is returned, its details wait in a thread-local ndm_error. */
#ifndef NDM_STATUS_H
#define NDM_STATUS_H

#include "nodedb_mem.h"

/* Each records the details and returns the status. `message` is a static string. */
int ndm_i_fail(int status, const char *message);
int ndm_i_fail_io(int os_errno, const char *message);
int ndm_i_fail_slot(int status, int64_t slot);
int ndm_i_fail_again(ndm_error before); /* as it was, after something else was tried */
int ndm_i_fail_budget(ndm_error details); /* of a governor */
int ndm_i_fail_capacity(uint64_t required, uint64_t limit);

/* Each completes the details where `result` is a failure, and returns it: which slot (where it is about one), which of
 * the region's files. */
int64_t ndm_i_of_slot(int64_t slot, int64_t result);
int64_t ndm_i_of_file(int file, int64_t result);

/* A call, or a part of one that tries again, ends with `result`. Unless that is a failure, what was refused on the way is
 * forgotten: the last error is again what it was `before`. Returns the result. */
int64_t ndm_i_ended(int64_t result, const ndm_error *before);

/* Complete the details of a failure for want of room: the fields from `views` to `disk_free`. */
void ndm_i_of_space(ndm_error space);

#endif
