/* What follows a failed write-back. */
#ifndef NDM_SALVAGE_H
#define NDM_SALVAGE_H

#include "os/file.h"
#include "store/grains.h"

/* Have all that is in RAM on disk, or make it dirty again. Begins with the grain of `from`, which is most in danger.
 * `storing` counts the extents that others may be storing to. 0 if all of it was found on disk; otherwise errno. `*lost`:
 * errno of what could not be written again either. The caller sees to it that nobody else drops pages. */
int ndm_i_salvage(const ndm_i_file *file, const ndm_i_grains *grains, const _Atomic uint64_t *storing, uint64_t from,
                  int *lost);

#endif
