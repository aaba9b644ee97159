/* See mapping.h. */
#define _GNU_SOURCE
#include "os/mapping.h"

#include "nodedb_mem.h"
#include "os/bits.h"
#include "os/fork.h"
#include "os/status.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

/* One call fetches no more than the device's readahead or its largest request, whichever is more, and what is left out is
 * read page by page: 64 MiB took 915 ms by one call, 40-60 ms in pieces of 128 KiB to 2 MiB. 128 KiB is the usual readahead,
 * and less than what devices take at once. */
#define FETCH_PIECE ((uint64_t)128 << 10)


/* Reserve address space that starts at a multiple of 2 MiB: folios of that size can be mapped whole then, and between two
 * such places mremap moves whole page tables (measured 35 times faster than otherwise). */
static uint8_t *reserve(uint64_t length)
{
    uint64_t room = length + NDM_I_HUGE;
    uint8_t *area = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (area == MAP_FAILED)
        return NULL;
    uint8_t *base = (uint8_t *)ndm_i_round_up((uintptr_t)area, NDM_I_HUGE);
    const uint64_t head = (uint64_t)(base - area), tail = room - head - length;
    /* Cutting needs a mapping more than the process may have: do without. What was cut off may be another thread's by then. */
    if (head > 0 && munmap(area, head) != 0) {
        munmap(area, room);
        return NULL;
    }
    if (tail > 0 && munmap(base + length, tail) != 0) {
        munmap(base, length + tail);
        return NULL;
    }
    return base;
}

static void try_again(void);

/* A mapping with its first user; the address space is filled in by the caller. */
static ndm_i_mapping *mapping_new(void)
{
    try_again();
    ndm_i_mapping *mapping = calloc(1, sizeof *mapping);
    if (!mapping)
        ndm_i_fail(NDM_ERR_MEMORY, "no memory for a mapping");
    else
        atomic_init(&mapping->users, 1);
    return mapping;
}

/* Fill in what mmap() gave; where it was refused, the mapping goes and NULL is given. */
static ndm_i_mapping *mapped(ndm_i_mapping *mapping, void *base, uint64_t length, const char *refused)
{
    if (base == MAP_FAILED) {
        ndm_i_fail_io(errno, refused);
        free(mapping);
        return NULL;
    }
    mapping->base = base;
    mapping->length = length;
    return mapping;
}

ndm_i_mapping *ndm_i_mapping_new(int fd, uint64_t length)
{
    ndm_i_mapping *mapping = mapping_new();
    if (!mapping)
        return NULL;
    length = ndm_i_round_up(length, NDM_I_HUGE);
    uint8_t *place = reserve(length);
    /* A failed call may have unmapped the place before, and another thread may have it by now: it is left alone. */
    void *base =
        mmap(place, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | (place ? MAP_FIXED : 0), fd, 0);
    if (!(mapping = mapped(mapping, base, length, "cannot map the file")))
        return NULL;
    madvise(base, length, MADV_DONTDUMP);
    madvise(base, length, MADV_RANDOM); /* readahead would fetch neighbours, in folios of any size */
    return mapping;
}

ndm_i_mapping *ndm_i_mapping_new_to_read(int fd, uint64_t length)
{
    ndm_i_mapping *mapping = mapping_new();
    if (!mapping)
        return NULL;
    uint8_t *place = reserve(length);
    void *base = mmap(place, length, PROT_READ, MAP_SHARED | MAP_NORESERVE | (place ? MAP_FIXED : 0), fd, 0);
    if ((mapping = mapped(mapping, base, length, "cannot map the file")))
        madvise(base, length, MADV_RANDOM);
    return mapping;
}

ndm_i_mapping *ndm_i_mapping_new_private(int fd, uint64_t offset, uint64_t size, char **address)
{
    const uint64_t start = ndm_i_round_down(offset, (uint64_t)sysconf(_SC_PAGESIZE));
    const uint64_t length = offset + size - start;
    ndm_i_mapping *mapping = mapping_new();
    if (!mapping)
        return NULL;
    void *base = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, fd, (off_t)start);
    if ((mapping = mapped(mapping, base, length, "cannot map the value")))
        *address = (char *)base + (offset - start);
    return mapping;
}

static int extend(ndm_i_mapping **mapping, uint64_t length)
{
    ndm_i_mapping *old = *mapping, *fresh = mapping_new();
    if (!fresh)
        return NDM_ERR_MEMORY;
    const bool viewed = atomic_load(&old->users) > 1;
    length = ndm_i_round_up(length, NDM_I_HUGE);
    uint8_t *place = reserve(length);
    void *base = mremap(old->base, viewed ? 0 : old->length, length, MREMAP_MAYMOVE | (place ? MREMAP_FIXED : 0), place);
    if (!(fresh = mapped(fresh, base, length, "cannot extend the mapping")))
        return NDM_ERR_IO;
    if (!viewed) {
        old->base = fresh->base;
        old->length = length;
        free(fresh);
        return NDM_OK;
    }
    ndm_i_mapping_forget(old, old->base, old->length, false); /* pages that no view touches could not be dropped otherwise */
    *mapping = fresh;
    ndm_i_mapping_unref(old);
    return NDM_OK;
}

int ndm_i_mapping_extend(ndm_i_mapping **mapping, uint64_t length)
{
    ndm_i_fork_bar();
    const int status = extend(mapping, length);
    ndm_i_fork_let();
    return status;
}

void ndm_i_mapping_forget(const ndm_i_mapping *mapping, const void *address, uint64_t size, bool wide)
{
    /* A fault maps the whole folio (Linux 6.18), or what is in RAM of the aligned 64 KiB around it (fault_around_bytes). So a
     * view of a value maps pages of its neighbours. They would stay for ever if nobody viewed those. */
    const uint64_t offset = (uint64_t)((const uint8_t *)address - mapping->base);
    const uint64_t around = wide ? NDM_I_HUGE : NDM_I_GRAIN; /* 2 us more where the 2 MiB have pages of their own */
    const uint64_t first = ndm_i_round_down(offset, around);
    const uint64_t last = ndm_i_min(ndm_i_round_up(offset + size, around), mapping->length);
    assert((const uint8_t *)address >= mapping->base && offset + size <= mapping->length);
    madvise(mapping->base + first, last - first, MADV_DONTNEED);
}

void ndm_i_mapping_fetch(const void *address, uint64_t size)
{
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint8_t *start = (uint8_t *)ndm_i_round_down((uintptr_t)address, page);
    const uint64_t length = ndm_i_round_up((uintptr_t)address + size, page) - (uintptr_t)start;
    for (uint64_t done = 0; done < length; done += FETCH_PIECE)
        madvise(start + done, ndm_i_min(length - done, FETCH_PIECE), MADV_WILLNEED);
}

void ndm_i_mapping_populate(void *address, uint64_t size) { madvise(address, size, MADV_POPULATE_WRITE); }

void ndm_i_mapping_renew(const ndm_i_mapping *mapping, uint64_t start, uint64_t end)
{
    /* Where a page is mapped for reading only, a fault makes that page writable. Where none is mapped, it maps the whole
     * folio, so that 128 faults become one. */
    ndm_i_mapping_forget(mapping, mapping->base + start, end - start, false);
    ndm_i_mapping_populate(mapping->base + start, end - start);
}

uint64_t ndm_i_mapping_faults(void)
{
    struct rusage usage;
    return getrusage(RUSAGE_THREAD, &usage) == 0 ? (uint64_t)(usage.ru_minflt + usage.ru_majflt) : 0;
}

bool ndm_i_mapping_in_core(void *address, uint64_t size, unsigned char *in_core)
{
    return mincore(address, size, in_core) == 0;
}

/* The kernel refuses to drop pages that are locked. */
static bool is_locked(void *page)
{
    return madvise(page, (size_t)sysconf(_SC_PAGESIZE), MADV_DONTNEED) != 0 && errno == EINVAL;
}

bool ndm_i_mapping_is_locked(const ndm_i_mapping *mapping) { return is_locked(mapping->base); }

int ndm_mappings_are_locked(void)
{
    const size_t size = (size_t)sysconf(_SC_PAGESIZE);
    void *page = mmap(NULL, size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        return 0;
    const bool locked = is_locked(page);
    munmap(page, size);
    return locked;
}

void ndm_i_mapping_ref(ndm_i_mapping *mapping) { atomic_fetch_add(&mapping->users, 1); }

/* ---- the end -------------------------------------------------------------------------------------------- */

/* Mappings that the system refused to unmap, oldest first. */
static pthread_mutex_t refused_lock = PTHREAD_MUTEX_INITIALIZER;
static ndm_i_mapping *refused_first, *refused_last;
static _Atomic uint64_t refused_count;
static ndm_i_fork_entry at_fork;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void stay(void *context) { (void)context; }

static void list_for_forks(void)
{
    at_fork = (ndm_i_fork_entry){.in_child = stay, .lock = &refused_lock};
    ndm_i_fork_add(&at_fork);
}

static void keep_refused(ndm_i_mapping *mapping)
{
    pthread_once(&once, list_for_forks);
    pthread_mutex_lock(&refused_lock);
    mapping->next = NULL;
    if (refused_last)
        refused_last->next = mapping;
    else
        refused_first = mapping;
    refused_last = mapping;
    atomic_fetch_add(&refused_count, 1);
    pthread_mutex_unlock(&refused_lock);
}

static ndm_i_mapping *take_refused(void)
{
    pthread_mutex_lock(&refused_lock);
    ndm_i_mapping *mapping = refused_first;
    if (mapping) {
        refused_first = mapping->next;
        if (!refused_first)
            refused_last = NULL;
        atomic_fetch_sub(&refused_count, 1);
    }
    pthread_mutex_unlock(&refused_lock);
    return mapping;
}

/* false: refused, and kept. */
static bool unmap(ndm_i_mapping *mapping)
{
    if (munmap(mapping->base, mapping->length) != 0) {
        keep_refused(mapping);
        return false;
    }
    free(mapping);
    return true;
}

/* Something was unmapped, or is going to be mapped: there may be room for those that were refused. Each that goes may make room
 * for more. */
static void try_again(void)
{
    enum { REFUSALS = 8 }; /* in a row: the others are tried next time */
    if (atomic_load(&refused_count) == 0)
        return;
    ndm_i_fork_bar();
    for (int refusals = 0; refusals < REFUSALS && atomic_load(&refused_count) > 0;) {
        ndm_i_mapping *mapping = take_refused();
        if (!mapping)
            break;
        if (!unmap(mapping))
            refusals++;
    }
    ndm_i_fork_let();
}

void ndm_i_mapping_unref(ndm_i_mapping *mapping)
{
    if (!mapping || ndm_i_mapping_unref_shared(mapping))
        return;
    ndm_i_fork_bar(); /* a child has no mapping without a user */
    if (atomic_fetch_sub(&mapping->users, 1) == 1 && unmap(mapping))
        try_again();
    ndm_i_fork_let();
}
