/* Parts that follow each other go into a file by few system calls. */
#ifndef NDM_GATHER_H
#define NDM_GATHER_H

#include "os/file.h"

#include <sys/uio.h>

/* pwritev all of it from `offset` on, of a file that may be written there. It is cut at grains; if `wide`, whole, aligned 1
 * and 2 MiB stay in one piece. Uses the array up. 0 or errno. */
int ndm_i_file_gather(const ndm_i_file *file, struct iovec *parts, uint64_t count, uint64_t offset, bool wide);

#endif
