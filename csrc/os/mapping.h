/* Address space: mappings of an open file, named by its descriptor. The only file with mmap, mremap, munmap, madvise and
 * mincore, and the count of what faults there. It knows nothing of what the file holds.
 *
 * A mapping is counted: each view holds one use, whoever drops the last use unmaps. Its base never changes while more
 * than its first holder uses it. Functions that return a pointer give NULL with the error set.
 *
 * Who makes a mapping bars forks (fork.h) until it is noted where a forked child finds it.
 */
#ifndef NDM_MAPPING_H
#define NDM_MAPPING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* Writes are cut at multiples of it, so no folio is larger, but for those of large values: these have up to 2 MiB, which one
 * entry of the page table maps. See grains.h. */
#define NDM_I_GRAIN ((uint64_t)512 << 10)
#define NDM_I_DOUBLE (2 * NDM_I_GRAIN)
#define NDM_I_HUGE (4 * NDM_I_GRAIN)

typedef struct ndm_i_mapping {
    uint8_t *base;
    uint64_t length;        /* bytes of address space */
    _Atomic uint64_t users; /* the file, each view, and the background writer while it looks */
    struct ndm_i_mapping *next; /* of those that could not be unmapped yet */
} ndm_i_mapping;

/* Map the file for reading and writing, with `length` bytes of address space; mapping past its end is legal. */
ndm_i_mapping *ndm_i_mapping_new(int fd, uint64_t length);

/* Map it for reading only. */
ndm_i_mapping *ndm_i_mapping_new_to_read(int fd, uint64_t length);

/* A private, copy-on-write mapping of [offset, offset + size); *address is where `offset` is. */
ndm_i_mapping *ndm_i_mapping_new_private(int fd, uint64_t offset, uint64_t size, char **address);

/* Give the mapping `length` bytes of address space. It moves when only its first holder uses it; otherwise it is
 * duplicated (mremap of 0 bytes), and *mapping is the duplicate; the old one stays with its views. A status. */
int ndm_i_mapping_extend(ndm_i_mapping **mapping, uint64_t length);

void ndm_i_mapping_ref(ndm_i_mapping *mapping);

/* Drop a use that is not the last one. false, and nothing is done: it is. */
static inline bool ndm_i_mapping_unref_shared(ndm_i_mapping *mapping)
{
    uint64_t users = atomic_load_explicit(&mapping->users, memory_order_relaxed);
    while (users > 1)
        if (atomic_compare_exchange_weak(&mapping->users, &users, users - 1))
            return true;
    return false;
}

/* Any thread; the last one unmaps; NULL is ignored. To unmap may need one mapping more than the process may have, where it
 * cuts one in two (vm.max_map_count). What is refused is kept, and tried again whenever something else was unmapped, or is mapped. */
void ndm_i_mapping_unref(ndm_i_mapping *mapping);

/* The pages of the range leave this process's RSS, with what a fault there has mapped besides: all of its grains; if `wide`,
 * all of the 2 MiB they lie in. Their contents stay in the page cache, and views of them still work. Any thread that holds
 * the mapping, which is of a whole file. */
void ndm_i_mapping_forget(const ndm_i_mapping *mapping, const void *address, uint64_t size, bool wide);

/* Read the range from disk in one go, if it is not in RAM. */
void ndm_i_mapping_fetch(const void *address, uint64_t size);

/* Map the pages of the range for writing, all at once; `address` is a page's. */
void ndm_i_mapping_populate(void *address, uint64_t size);

/* The same for a range that is mapped in part, or not for writing. A fault there costs as much as the folio is large. */
void ndm_i_mapping_renew(const ndm_i_mapping *mapping, uint64_t start, uint64_t end);

/* Page faults of this thread so far. 0.4 us. */
uint64_t ndm_i_mapping_faults(void);

/* Is the mapping locked in RAM? Its first page leaves the RSS if not. */
bool ndm_i_mapping_is_locked(const ndm_i_mapping *mapping);

/* Which pages of the range are in RAM: bit 0 of each byte of `in_core`. false with errno. */
bool ndm_i_mapping_in_core(void *address, uint64_t size, unsigned char *in_core);

#endif
