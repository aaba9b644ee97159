/* memcpy into the mapping. */
#ifndef NDM_COPY_H
#define NDM_COPY_H

#include <stddef.h>

void ndm_i_copy(void *target, const void *source, size_t size);

#endif
