/* What a file system keeps its files on: a disk, or RAM, which has no other place for them. */
#ifndef NDM_MEDIUM_H
#define NDM_MEDIUM_H

#include "nodedb_mem.h"

/* Of an open file: an ndm_medium. */
int ndm_i_medium(int fd);

#endif
