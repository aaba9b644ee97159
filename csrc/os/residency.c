/* See residency.h. */
#define _GNU_SOURCE
#include "os/residency.h"

#include "os/bits.h"
#include "os/fork.h"
#include "os/status.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { FACCESSAT2 = 439, CACHESTAT = 451 }; /* the same numbers on every architecture; Linux 5.8, 6.5 */

typedef struct {
    uint64_t cached, dirty, writeback, evicted, recently_evicted;
} cachestat_counts;

/* Pages of [start, end), by state. false: the kernel is too old, or does not tell this user. */
static bool count_pages(const ndm_i_file *file, uint64_t start, uint64_t end, cachestat_counts *counts)
{
    struct {
        uint64_t offset, length;
    } range = {start, end - start};
    return syscall(CACHESTAT, file->fd, &range, counts, 0) == 0;
}

/* Pages of [start, end) that are in the page cache, and how many there are. false: the kernel does not tell. */
static bool count_cached(const ndm_i_file *file, uint64_t start, uint64_t end, uint64_t *cached, uint64_t *all)
{
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    cachestat_counts counts;
    start = ndm_i_round_down(start, page);
    end = ndm_i_round_up(end, page);
    if (!count_pages(file, start, end, &counts))
        return false;
    *cached = counts.cached;
    *all = (end - start) / page;
    return true;
}

bool ndm_i_is_cached(const ndm_i_file *file, uint64_t start, uint64_t end)
{
    uint64_t cached, all;
    return count_cached(file, start, end, &cached, &all) && cached >= all;
}

bool ndm_i_is_missing(const ndm_i_file *file, uint64_t start, uint64_t end)
{
    uint64_t cached, all;
    return count_cached(file, start, end, &cached, &all) && cached < all;
}

/* Does mincore() tell the truth? To those who neither own the file nor may write to it, it shows every page as resident.
 * O_NOATIME is for owners, in the sense of the kernel (CAP_FOWNER), and does nothing else for a file that is mapped. */
static bool may_see_residency(const ndm_i_file *file)
{
    const int flags = fcntl(file->fd, F_GETFL);
    if (flags >= 0 && fcntl(file->fd, F_SETFL, flags | O_NOATIME) == 0) {
        fcntl(file->fd, F_SETFL, flags);
        return true;
    }
    return syscall(FACCESSAT2, file->fd, "", W_OK, AT_EACCESS | AT_EMPTY_PATH) == 0;
}

/* By mincore(), through a mapping of the whole file. */
static int count_resident(const ndm_i_file *file, ndm_i_mapping *mapping, uint64_t *resident)
{
    enum { AT_ONCE = 4096 };
    unsigned char in_core[AT_ONCE];
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    for (uint64_t start = 0; start < file->capacity; start += AT_ONCE * page) {
        const uint64_t length = ndm_i_min(AT_ONCE * page, file->capacity - start);
        if (!ndm_i_mapping_in_core(mapping->base + start, length, in_core))
            return ndm_i_fail_io(errno, "cannot ask what is resident");
        for (uint64_t i = 0; i < ndm_i_round_up(length, page) / page; i++)
            *resident += (in_core[i] & 1) * page;
    }
    return NDM_OK;
}

/* The kernel's own count (Linux 6.5); only the resident pages, by mincore(), where it is missing. Neither is for those who
 * may not write to the file (cachestat: in newer kernels). */
int ndm_i_residency(const ndm_i_file *file, uint64_t *resident, uint64_t *unwritten)
{
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    cachestat_counts counts;
    if (count_pages(file, 0, file->capacity, &counts)) {
        *resident = counts.cached * page;
        *unwritten = (counts.dirty + counts.writeback) * page;
        return NDM_OK;
    }
    *resident = *unwritten = 0;
    if (!may_see_residency(file)) {
        *resident = UINT64_MAX;
        return NDM_OK;
    }
    if (file->capacity == 0)
        return NDM_OK;
    if (file->mapping)
        return count_resident(file, file->mapping, resident);
    ndm_i_fork_bar();
    ndm_i_mapping *mapping = ndm_i_mapping_new_to_read(file->fd, file->capacity); /* a reader's file has none of its own */
    const int status = mapping ? count_resident(file, mapping, resident) : ndm_last_error()->status;
    ndm_i_mapping_unref(mapping);
    ndm_i_fork_let();
    return status;
}
