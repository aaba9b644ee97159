/* See pagemap.h. */
#define _GNU_SOURCE
#include "pagemap.h"

#include <sys/ioctl.h>
#include <unistd.h>

/* From linux/fs.h, which older systems lack: struct pm_scan_arg, and the categories of pages. */
typedef struct {
    uint64_t size, flags, start, end, walk_end, regions, regions_size, max_pages;
    uint64_t inverted, all_of, any_of, returned;
} scan;

typedef struct {
    uint64_t start, end, categories;
} scanned;

#define PAGEMAP_SCAN _IOWR('f', 16, scan)
enum { IS_FILE = 1 << 2, IS_PRESENT = 1 << 3, IS_SWAPPED = 1 << 4 };

/* Of an entry of the file. */
#define ENTRY_PRESENT ((uint64_t)1 << 63)
#define ENTRY_SWAPPED ((uint64_t)1 << 62)
#define ENTRY_FILE ((uint64_t)1 << 61)

typedef struct {
    uint64_t start, end;
} span;

static span pages_of(const void *address, uint64_t size)
{
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), start = (uintptr_t)address;
    return (span){start / page * page, (start + size + page - 1) / page * page};
}

int ndm_i_is_changed(int pagemap, const void *address, uint64_t size)
{
    const span pages = pages_of(address, size);
    scanned found;
    /* One page that is in RAM or in the swap space, and is not the file's. */
    scan wanted = {.size = sizeof wanted,
                   .start = pages.start,
                   .end = pages.end,
                   .regions = (uintptr_t)&found,
                   .regions_size = 1,
                   .max_pages = 1,
                   .inverted = IS_FILE,
                   .all_of = IS_FILE,
                   .any_of = IS_PRESENT | IS_SWAPPED,
                   .returned = IS_FILE};
    const int regions = ioctl(pagemap, PAGEMAP_SCAN, &wanted);
    return regions < 0 ? -1 : regions > 0;
}

int ndm_i_is_changed_by_page(int pagemap, const void *address, uint64_t size)
{
    enum { AT_ONCE = 1024 };
    uint64_t entries[AT_ONCE];
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    const span pages = pages_of(address, size);
    for (uint64_t first = pages.start / page; first < pages.end / page; first += AT_ONCE) {
        const uint64_t left = pages.end / page - first, count = left < AT_ONCE ? left : AT_ONCE;
        const ssize_t got = pread(pagemap, entries, count * sizeof *entries, (off_t)(first * sizeof *entries));
        if (got < 0 || (uint64_t)got < count * sizeof *entries)
            return -1;
        for (uint64_t i = 0; i < count; i++)
            if (entries[i] & (ENTRY_PRESENT | ENTRY_SWAPPED) && !(entries[i] & ENTRY_FILE))
                return 1;
    }
    return 0;
}
