/* What of a file is in RAM: the kernel's word, never our own guess. */
#ifndef NDM_RESIDENCY_H
#define NDM_RESIDENCY_H

#include "os/file.h"

/* Is all of [start, end) in the page cache? false also where the kernel cannot tell cheaply (before Linux 6.5). */
bool ndm_i_is_cached(const ndm_i_file *file, uint64_t start, uint64_t end);

/* Is some of it not there? false also where the kernel cannot tell cheaply. */
bool ndm_i_is_missing(const ndm_i_file *file, uint64_t start, uint64_t end);

/* Bytes of the file in RAM (UINT64_MAX: the kernel does not tell this user), and of these not yet on disk (0 where it
 * cannot tell). Linear in the pages. A status. */
int ndm_i_residency(const ndm_i_file *file, uint64_t *resident, uint64_t *unwritten);

#endif
