/* Blocks of the file system: a grain has them all before a byte of it is stored through the mapping. Owner only. */
#ifndef NDM_BLOCKS_H
#define NDM_BLOCKS_H

#include "store/store.h"

/* Ask for blocks up to `end` and beyond, in large steps. A refusal is no failure: later calls will find out what is really
 * there. */
void ndm_i_blocks_ahead(ndm_i_store *store, uint64_t end);

/* Give a grain all its blocks, and all that may share a folio with it. 0 or errno. */
int ndm_i_blocks_of_grain(ndm_i_store *store, uint64_t grain);

#endif
