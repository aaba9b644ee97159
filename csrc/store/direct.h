/* Storing by pwrite: all large values, and others where no memcpy is safe or cheap. It maps nothing. Owner only.
 *
 * The functions give a status with the error set, and note what has become of the grains.
 */
#ifndef NDM_DIRECT_H
#define NDM_DIRECT_H

#include "store/store.h"

#include <sys/uio.h>

/* Copy `size` bytes to `offset`, of a file that may be written there. */
int ndm_i_direct_put(ndm_i_store *store, uint64_t offset, const void *data, uint64_t size);

/* A large value, of any file. What small values have left mapped in its place is forgotten. */
int ndm_i_direct_put_large(ndm_i_store *store, uint64_t offset, const void *data, uint64_t size);

/* The same, from parts that follow each other. Uses the array up. */
int ndm_i_direct_gather(ndm_i_store *store, uint64_t offset, struct iovec *parts, uint64_t count, uint64_t size);

#endif
