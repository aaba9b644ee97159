/* The mappings of the file: see backing.h. */
#define _GNU_SOURCE
#include "os/file.h"

#include "os/status.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define HUGE_PAGE ((uint64_t)2 << 20)

/* One call fetches no more than the device's readahead or its largest request, whichever is more, and what is left out is
 * read page by page: 64 MiB took 915 ms by one call, 40-60 ms in pieces of 128 KiB to 2 MiB. 128 KiB is the usual readahead,
 * and less than what devices take at once. */
#define FETCH_PIECE ((uint64_t)128 << 10)

static uint64_t round_up(uint64_t value, uint64_t grain) { return (value + grain - 1) / grain * grain; }

static uint64_t round_down(uint64_t value, uint64_t grain) { return value / grain * grain; }

/* Reserve address space that starts at a multiple of 2 MiB: between two such places mremap moves whole page tables
 * (measured 35 times faster than otherwise). */
static uint8_t *reserve(uint64_t length)
{
    uint64_t room = length + HUGE_PAGE;
    uint8_t *area = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (area == MAP_FAILED)
        return NULL;
    uint8_t *base = (uint8_t *)round_up((uintptr_t)area, HUGE_PAGE);
    if (base > area)
        munmap(area, (size_t)(base - area));
    uint64_t tail = room - (uint64_t)(base - area) - length;
    if (tail > 0)
        munmap(base + length, tail);
    return base;
}

int ndm_i_map_fresh(ndm_i_backing *backing, uint64_t length)
{
    ndm_i_mapping *mapping = malloc(sizeof *mapping);
    if (!mapping)
        return ndm_i_fail(NDM_ERR_MEMORY, "no memory for a mapping");
    length = round_up(length, HUGE_PAGE);
    uint8_t *place = reserve(length);
    uint8_t *base = mmap(place, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | (place ? MAP_FIXED : 0),
                         backing->fd, 0);
    if (base == MAP_FAILED) {
        int refused = errno;
        if (place)
            munmap(place, length);
        free(mapping);
        return ndm_i_fail_io(refused, "cannot map the file");
    }
    madvise(base, length, MADV_DONTDUMP);
    madvise(base, length, MADV_RANDOM); /* readahead would fetch neighbours, in folios of any size */
    *mapping = (ndm_i_mapping){.base = base, .length = length, .users = 1};
    backing->mapping = mapping;
    return NDM_OK;
}

int ndm_i_remap(ndm_i_backing *backing, uint64_t length)
{
    ndm_i_mapping *old = backing->mapping;
    ndm_i_mapping *fresh = malloc(sizeof *fresh);
    if (!fresh)
        return ndm_i_fail(NDM_ERR_MEMORY, "no memory for a mapping");
    bool viewed = atomic_load(&old->users) > 1;
    length = round_up(length, HUGE_PAGE);
    uint8_t *place = reserve(length);
    uint8_t *base = mremap(old->base, viewed ? 0 : old->length, length, MREMAP_MAYMOVE | (place ? MREMAP_FIXED : 0),
                           place);
    if (base == MAP_FAILED) {
        int refused = errno;
        if (place)
            munmap(place, length);
        free(fresh);
        return ndm_i_fail_io(refused, "cannot extend the mapping");
    }
    if (!viewed) {
        free(fresh);
        old->base = base;
        old->length = length;
        return NDM_OK;
    }
    ndm_i_mapping_forget(old->base, old->length); /* pages that no view touches could not be dropped otherwise */
    *fresh = (ndm_i_mapping){.base = base, .length = length, .users = 1};
    backing->mapping = fresh;
    ndm_i_mapping_unref(old);
    return NDM_OK;
}

ndm_i_mapping *ndm_i_backing_map_private(const ndm_i_backing *backing, uint64_t offset, uint64_t size, char **address)
{
    const uint64_t start = round_down(offset, (uint64_t)sysconf(_SC_PAGESIZE));
    const uint64_t length = offset + size - start;
    ndm_i_mapping *mapping = malloc(sizeof *mapping);
    if (!mapping) {
        ndm_i_fail(NDM_ERR_MEMORY, "no memory for a mapping");
        return NULL;
    }
    uint8_t *base =
        mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, backing->fd, (off_t)start);
    if (base == MAP_FAILED) {
        ndm_i_fail_io(errno, "cannot map the value");
        free(mapping);
        return NULL;
    }
    *mapping = (ndm_i_mapping){.base = base, .length = length, .users = 1};
    *address = (char *)base + (offset - start);
    return mapping;
}

ndm_i_mapping *ndm_i_backing_map_to_read(const ndm_i_backing *backing, uint64_t length)
{
    ndm_i_mapping *mapping = malloc(sizeof *mapping);
    if (!mapping) {
        ndm_i_fail(NDM_ERR_MEMORY, "no memory for a mapping");
        return NULL;
    }
    uint8_t *base = mmap(NULL, length, PROT_READ, MAP_SHARED | MAP_NORESERVE, backing->fd, 0);
    if (base == MAP_FAILED) {
        ndm_i_fail_io(errno, "cannot map the file");
        free(mapping);
        return NULL;
    }
    madvise(base, length, MADV_RANDOM);
    *mapping = (ndm_i_mapping){.base = base, .length = length, .users = 1};
    return mapping;
}

/* The whole pages inside [address, address + size), or touching it; 0 if there are none. */
static uint64_t pages_of(uint8_t **address, uint64_t size, bool inside)
{
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), start = (uintptr_t)*address;
    const uint64_t first = inside ? round_up(start, page) : round_down(start, page);
    const uint64_t last = inside ? round_down(start + size, page) : round_up(start + size, page);
    *address += (int64_t)(first - start);
    return last > first ? last - first : 0;
}

void ndm_i_mapping_forget(void *address, uint64_t size)
{
    uint8_t *start = address;
    const uint64_t length = pages_of(&start, size, true);
    if (length > 0)
        madvise(start, length, MADV_DONTNEED);
}

void ndm_i_mapping_fetch(void *address, uint64_t size)
{
    uint8_t *start = address;
    const uint64_t length = pages_of(&start, size, false);
    for (uint64_t done = 0; done < length; done += FETCH_PIECE)
        madvise(start + done, length - done < FETCH_PIECE ? length - done : FETCH_PIECE, MADV_WILLNEED);
}

void ndm_i_mapping_ref(ndm_i_mapping *mapping) { atomic_fetch_add(&mapping->users, 1); }

void ndm_i_mapping_unref(ndm_i_mapping *mapping)
{
    if (atomic_fetch_sub(&mapping->users, 1) > 1)
        return;
    munmap(mapping->base, mapping->length);
    free(mapping);
}
