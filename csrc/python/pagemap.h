/* Which pages of a private mapping of a file were stored to: of these the kernel has made a copy. */
#ifndef NDM_PYTHON_PAGEMAP_H
#define NDM_PYTHON_PAGEMAP_H

#include <stdint.h>

/* Was a page of [address, address + size) stored to? 1 or 0; -1: the kernel does not tell. `pagemap` is a descriptor of
 * /proc/self/pagemap that this process has opened. */
int ndm_i_is_changed(int pagemap, const void *address, uint64_t size);

/* The same for a kernel before Linux 6.7: slower, as it looks at each page. */
int ndm_i_is_changed_by_page(int pagemap, const void *address, uint64_t size);

#endif
