/* Many values at once: what is not in RAM is asked for in file order, in windows that leave room under the cache limit.
 *
 * That takes an array, a sort, and calls of the kernel. Where everything is in RAM they are for nothing. So a batch goes
 * value by value until one of them had to be fetched (ndm_i_store.misses), and gathers the rest. Where the books cannot
 * know, because the kernel may have dropped what it liked, a few values are looked at first (ndm_i_store_misses()).
 */
#ifndef NDM_GATHER_H
#define NDM_GATHER_H

#include "store/ahead.h"
#include "store/store.h"

/* Is [offset, offset + size) missing from RAM, at least in part? Asks the kernel only if the books do not know. */
bool ndm_i_store_misses(ndm_i_store *store, uint64_t offset, uint64_t size);

/* In the next two, `base` is where the file is mapped, and stays so if others may come in.
 *
 * The places are about to be read through the mapping: bring them to RAM. Where they lie in more grains than half the
 * cache limit, only the last ones, in file order, are asked for: the first would be dropped before they are read. */
void ndm_i_store_gather(ndm_i_store *store, const uint8_t *base, ndm_i_wanted *wanted, uint64_t count);

/* Copy each place out, to `buffer` + tag. */
int ndm_i_store_load_many(ndm_i_store *store, const uint8_t *base, ndm_i_wanted *wanted, uint64_t count,
                          uint8_t *buffer);

#endif
