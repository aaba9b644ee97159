#define _GNU_SOURCE
#include "backing.h"

#include "status.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

enum { NDM_I_EMPTY, NDM_I_PARTIAL, NDM_I_READY };

#define GRAIN ((uint64_t)512 << 10)
#define HUGE_PAGE ((uint64_t)2 << 20)

/* Measured on ext4, us per MiB of cold 64 B to 1 MiB values: memcpy into a sparse mapping 300, into fallocated
 * space 225, into fallocated space zeroed by pwrite, a grain at a time, 120. Asking for blocks in large pieces keeps
 * the file's extents few; a zeroed grain is still in the CPU's cache when values are copied into it. */
#define ALLOCATE_STEP ((uint64_t)16 << 20)

/* From this size up a value is written by pwrite, which needs no zeroing first, leaves the pages out of this
 * process's RSS, and takes no page fault (5.6 us per 4 KiB where the last write was a pwrite). */
#define PWRITE_FROM ((uint64_t)256 << 10)

static uint64_t round_up(uint64_t value, uint64_t grain) { return (value + grain - 1) / grain * grain; }

static uint64_t round_down(uint64_t value, uint64_t grain) { return value / grain * grain; }

static uint64_t min(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* ---- opening -------------------------------------------------------------------------------------------- */

static int examine(ndm_i_backing *backing)
{
    struct statx facts;
    struct statfs system;
    if (statx(backing->fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS | STATX_BTIME, &facts) != 0 ||
        fstatfs(backing->fd, &system) != 0)
        return ndm_i_fail_io(errno, "cannot examine the file");
    if (!S_ISREG(facts.stx_mode))
        return ndm_i_fail_io(EINVAL, "not a regular file");
    backing->capacity = facts.stx_size;
    backing->inode = facts.stx_ino;
    if (facts.stx_mask & STATX_BTIME)
        backing->born = (uint64_t)facts.stx_btime.tv_sec * 1000000000u + facts.stx_btime.tv_nsec;
    backing->in_memory = system.f_type == TMPFS_MAGIC;
    backing->can_allocate = backing->can_punch = true;
    return NDM_OK;
}

int ndm_i_backing_open(ndm_i_backing *backing, const char *path, bool create)
{
    *backing = (ndm_i_backing){.fd = -1};
    const int flags = O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY;
    int status;
    /* O_EXCL tells whether the file is ours to remove if something fails later. */
    if (create)
        backing->fd = open(path, flags | O_CREAT | O_EXCL, 0600);
    backing->created = backing->fd >= 0;
    if (!create || (backing->fd < 0 && errno == EEXIST))
        backing->fd = open(path, flags);
    if (backing->fd < 0)
        return ndm_i_fail_io(errno, "cannot open the file");
    if ((status = examine(backing)) != NDM_OK)
        goto fail;
    if (flock(backing->fd, LOCK_EX | LOCK_NB) != 0) {
        status = errno == EWOULDBLOCK ? ndm_i_fail(NDM_ERR_BUSY, "the file is locked by another region")
                                      : ndm_i_fail_io(errno, "cannot lock the file");
        backing->created = false; /* somebody else's by now */
        goto fail;
    }
    return NDM_OK;

fail:
    ndm_i_backing_close(backing, backing->created ? path : NULL);
    return status;
}

static int unnamed_file(const char *directory)
{
    int fd = open(directory, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR))
        return fd;
    size_t room = strlen(directory) + sizeof "/nodedb-mem-XXXXXX";
    char *name = malloc(room);
    if (!name)
        return -1;
    strcat(strcpy(name, directory), "/nodedb-mem-XXXXXX");
    fd = mkostemp(name, O_CLOEXEC);
    if (fd >= 0)
        unlink(name);
    int saved = errno;
    free(name);
    errno = saved;
    return fd;
}

int ndm_i_backing_open_unnamed(ndm_i_backing *backing, const char *directory)
{
    *backing = (ndm_i_backing){.fd = -1};
    backing->fd = directory ? unnamed_file(directory) : memfd_create("nodedb_mem", MFD_CLOEXEC);
    if (backing->fd < 0)
        return ndm_i_fail_io(errno, "cannot create an unnamed file");
    int status = examine(backing);
    if (status != NDM_OK)
        ndm_i_backing_close(backing, NULL);
    return status;
}

int ndm_i_backing_has_data(const ndm_i_backing *backing)
{
    if (lseek(backing->fd, 0, SEEK_DATA) >= 0)
        return 1;
    return errno == ENXIO ? 0 : ndm_i_fail_io(errno, "cannot look for data in the file");
}

int ndm_i_backing_load(const ndm_i_backing *backing, uint64_t offset, void *buffer, uint64_t size)
{
    ssize_t got = pread(backing->fd, buffer, size, (off_t)offset);
    if (got == (ssize_t)size)
        return NDM_OK;
    return ndm_i_fail_io(got < 0 ? errno : EIO, "cannot read the file");
}

/* ---- the mapping ---------------------------------------------------------------------------------------- */

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

static int map_fresh(ndm_i_backing *backing, uint64_t length)
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

/* Give the current mapping `length` bytes of address space: move it when only we look through it, otherwise
 * duplicate it (mremap of 0 bytes) and leave the old one to its views. */
static int remap(ndm_i_backing *backing, uint64_t length)
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
    *fresh = (ndm_i_mapping){.base = base, .length = length, .users = 1};
    backing->mapping = fresh;
    ndm_i_mapping_unref(old);
    return NDM_OK;
}

void ndm_i_mapping_ref(ndm_i_mapping *mapping) { atomic_fetch_add(&mapping->users, 1); }

void ndm_i_mapping_unref(ndm_i_mapping *mapping)
{
    if (atomic_fetch_sub(&mapping->users, 1) > 1)
        return;
    munmap(mapping->base, mapping->length);
    free(mapping);
}

/* ---- size and contents ----------------------------------------------------------------------------------------------- */

/* pwrite all of it, cut at grains. `data` NULL: zeros. Returns 0 or errno. */
static int write_all(int fd, const uint8_t *data, uint64_t size, uint64_t offset)
{
    static const uint8_t zeros[GRAIN];
    while (size > 0) {
        const uint64_t piece = min(size, GRAIN - offset % GRAIN);
        const ssize_t done = pwrite(fd, data ? data : zeros, piece, (off_t)offset);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return done < 0 ? errno : EIO;
        if (data)
            data += done;
        size -= (uint64_t)done;
        offset += (uint64_t)done;
    }
    return 0;
}

/* Get blocks for [start, end); what is there stays. Where the file system knows no fallocate(), writing gets them.
 * Returns 0 or errno. */
static int allocate(ndm_i_backing *backing, uint64_t start, uint64_t end)
{
    if (!backing->can_allocate || fallocate(backing->fd, 0, (off_t)start, (off_t)(end - start)) == 0)
        return 0;
    if (errno != EOPNOTSUPP)
        return errno;
    backing->can_allocate = false;
    return 0;
}

static uint64_t grain_count(uint64_t capacity) { return round_up(capacity, GRAIN) / GRAIN; }

/* Writing or sizing a file past RLIMIT_FSIZE would raise SIGXFSZ besides failing. */
static bool over_size_limit(uint64_t end)
{
    struct rlimit limit;
    return getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY && end > limit.rlim_cur;
}

static int set_size(int fd, uint64_t size)
{
    if (over_size_limit(size))
        return EFBIG;
    return ftruncate(fd, (off_t)size) == 0 ? 0 : errno;
}

/* May the file be written up to `end`? If somebody else has shortened it, touching the mapping past their end
 * would be SIGBUS. */
static int check_writable(const ndm_i_backing *backing, uint64_t end)
{
    struct stat facts;
    if (fstat(backing->fd, &facts) != 0)
        return ndm_i_fail_io(errno, "cannot examine the file");
    if ((uint64_t)facts.st_size != backing->capacity)
        return ndm_i_fail_io(EIO, "the file's size was changed by someone else");
    if (over_size_limit(end))
        return ndm_i_fail_io(EFBIG, "the process's file size limit is below the file's size");
    return NDM_OK;
}

int ndm_i_backing_start(ndm_i_backing *backing, uint64_t capacity, uint64_t ceiling)
{
    if (backing->capacity > 0 && ftruncate(backing->fd, 0) != 0)
        return ndm_i_fail_io(errno, "cannot empty the file");
    int refused = set_size(backing->fd, capacity);
    if (refused)
        return ndm_i_fail_io(refused, "cannot size the file");
    backing->grains = calloc(grain_count(capacity), 1);
    if (!backing->grains)
        return ndm_i_fail(NDM_ERR_MEMORY, "no memory for grain states");
    backing->capacity = capacity;
    int status = map_fresh(backing, ceiling);
    if (status != NDM_OK && ceiling > capacity)
        status = map_fresh(backing, capacity); /* RLIMIT_AS: growth will remap */
    return status;
}

int ndm_i_backing_grow(ndm_i_backing *backing, uint64_t needed, uint64_t wanted, uint64_t ceiling)
{
    int status = check_writable(backing, backing->capacity);
    if (status != NDM_OK)
        return status;
    uint64_t old_count = grain_count(backing->capacity);
    uint8_t *grains = realloc(backing->grains, grain_count(wanted));
    if (!grains)
        return ndm_i_fail(NDM_ERR_MEMORY, "no memory for grain states");
    memset(grains + old_count, NDM_I_EMPTY, grain_count(wanted) - old_count);
    backing->grains = grains;

    int refused = set_size(backing->fd, wanted);
    if (refused && wanted > needed) {
        wanted = needed;
        refused = set_size(backing->fd, wanted);
    }
    /* A grain that the old end cut has blocks up to there only. */
    const uint64_t rest = min(round_up(backing->capacity, GRAIN), wanted);
    if (!refused && rest > backing->capacity && grains[old_count - 1] == NDM_I_READY) {
        refused = allocate(backing, backing->capacity, rest);
        if (!refused)
            refused = write_all(backing->fd, NULL, rest - backing->capacity, backing->capacity);
    }
    if (refused) {
        ndm_i_backing_shrink(backing, backing->capacity);
        return ndm_i_fail_io(refused, "cannot extend the file");
    }
    if (wanted > backing->mapping->length) {
        status = remap(backing, ceiling);
        if (status != NDM_OK && ceiling > wanted)
            status = remap(backing, wanted);
        if (status != NDM_OK) {
            ndm_i_backing_shrink(backing, backing->capacity);
            return status;
        }
    }
    backing->capacity = wanted;
    return NDM_OK;
}

void ndm_i_backing_shrink(ndm_i_backing *backing, uint64_t capacity)
{
    if (ftruncate(backing->fd, (off_t)capacity) != 0)
        return; /* too long is harmless */
    backing->capacity = capacity;
    backing->allocated = min(backing->allocated, capacity);
}

/* ---- writing -------------------------------------------------------------------------------------------- */

/* Ask for blocks in large steps. A refusal is no failure: allocate() will find out what is really there. */
static void allocate_ahead(ndm_i_backing *backing, uint64_t end)
{
    if (backing->in_memory || end <= backing->allocated)
        return;
    const uint64_t upto = min(round_up(end, ALLOCATE_STEP), backing->capacity);
    if (allocate(backing, backing->allocated, upto) == 0)
        backing->allocated = upto;
}

/* Give a grain all its blocks; an empty one also pages in the page cache. Returns 0 or errno. */
static int make_ready(ndm_i_backing *backing, uint64_t grain)
{
    const uint64_t start = grain * GRAIN, end = min(start + GRAIN, backing->capacity);
    const bool empty = backing->grains[grain] == NDM_I_EMPTY;
    if (!empty && !backing->can_allocate)
        return ENOSPC; /* only zeroing would get its blocks, and it holds values */
    /* Blocks first: a write that failed for want of them would leave a folio behind that has none. */
    int refused = allocate(backing, start, end);
    if (!refused && empty) {
        if (backing->in_memory)
            madvise(backing->mapping->base + start, end - start, MADV_POPULATE_WRITE);
        else
            refused = write_all(backing->fd, NULL, end - start, start);
    }
    if (!refused)
        backing->grains[grain] = NDM_I_READY;
    return refused;
}

/* Is every grain of [offset, end) ready? */
static bool is_ready(const ndm_i_backing *backing, uint64_t offset, uint64_t end)
{
    uint64_t grain = offset / GRAIN;
    while (grain < grain_count(end) && backing->grains[grain] == NDM_I_READY)
        grain++;
    return grain >= grain_count(end);
}

int ndm_i_backing_prepare(ndm_i_backing *backing, uint64_t offset, uint64_t size)
{
    const uint64_t end = offset + size;
    if (is_ready(backing, offset, end))
        return NDM_OK;
    int status = check_writable(backing, end);
    if (status != NDM_OK)
        return status;
    allocate_ahead(backing, end);
    for (uint64_t grain = offset / GRAIN; grain < grain_count(end); grain++) {
        if (backing->grains[grain] == NDM_I_READY)
            continue;
        int refused = make_ready(backing, grain);
        if (refused)
            return ndm_i_fail_io(refused, "cannot get room in the file");
    }
    return NDM_OK;
}

/* Write by pwrite, and note what that makes of the grains: ready, if they have been given all their blocks or the
 * value fills them; otherwise partial. */
static int store_directly(ndm_i_backing *backing, uint64_t offset, const uint8_t *data, uint64_t size)
{
    const uint64_t end = offset + size;
    int status = check_writable(backing, end);
    if (status != NDM_OK)
        return status;
    allocate_ahead(backing, end);
    const uint64_t first = round_down(offset, GRAIN), last = min(round_up(end, GRAIN), backing->capacity);
    const bool all = is_ready(backing, offset, end) ||
                     (allocate(backing, first, last) == 0 && backing->can_allocate);
    int refused = write_all(backing->fd, data, size, offset);
    if (refused)
        return ndm_i_fail_io(refused, "cannot write to the file");
    for (uint64_t grain = first / GRAIN; grain < grain_count(end); grain++) {
        const bool filled = grain * GRAIN >= offset && min((grain + 1) * GRAIN, backing->capacity) <= end;
        if (all || filled)
            backing->grains[grain] = NDM_I_READY;
        else if (backing->grains[grain] == NDM_I_EMPTY)
            backing->grains[grain] = NDM_I_PARTIAL;
    }
    return NDM_OK;
}

int ndm_i_backing_store(ndm_i_backing *backing, uint64_t offset, const void *data, uint64_t size)
{
    if (size < PWRITE_FROM) {
        int status = ndm_i_backing_prepare(backing, offset, size);
        if (status == NDM_OK)
            memcpy(backing->mapping->base + offset, data, size);
        if (status == NDM_OK || ndm_last_error()->os_errno != ENOSPC)
            return status;
        /* No room for whole grains: there may be some for these bytes. */
    }
    return store_directly(backing, offset, data, size);
}

int ndm_i_backing_move(ndm_i_backing *backing, uint64_t from, uint64_t to, uint64_t size)
{
    int status = ndm_i_backing_prepare(backing, to, size);
    if (status == NDM_OK)
        memmove(backing->mapping->base + to, backing->mapping->base + from, size);
    return status;
}

/* ---- giving back ---------------------------------------------------------------------------------------- */

void ndm_i_backing_punch(ndm_i_backing *backing, uint64_t offset, uint64_t size)
{
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    const uint64_t start = round_up(offset, page);
    const bool to_end = offset + size >= backing->capacity;
    const uint64_t end = to_end ? round_up(backing->capacity, GRAIN) : round_down(offset + size, page);
    if (start >= end || !backing->can_punch)
        return;
    /* Blocks asked for ahead lie under grains that are still empty. */
    const bool ahead = to_end && backing->allocated > start;
    const uint64_t first = start / GRAIN, last = grain_count(end);
    uint64_t touched = first;
    while (touched < last && backing->grains[touched] == NDM_I_EMPTY)
        touched++;
    if (!ahead && touched == last)
        return;
    if (fallocate(backing->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)start, (off_t)(end - start)) != 0) {
        backing->can_punch = errno != EOPNOTSUPP;
        return;
    }
    for (uint64_t grain = first; grain < last; grain++) {
        const bool whole = grain * GRAIN >= start && (grain + 1) * GRAIN <= end;
        if (whole)
            backing->grains[grain] = NDM_I_EMPTY;
        else if (backing->grains[grain] == NDM_I_READY)
            backing->grains[grain] = NDM_I_PARTIAL;
    }
    if (ahead)
        backing->allocated = start;
}

int ndm_i_backing_disk_bytes(const ndm_i_backing *backing, uint64_t *bytes)
{
    struct stat facts;
    if (fstat(backing->fd, &facts) != 0)
        return ndm_i_fail_io(errno, "cannot examine the file");
    *bytes = (uint64_t)facts.st_blocks * 512;
    return NDM_OK;
}

/* ---- the end -------------------------------------------------------------------------------------------- */

void ndm_i_backing_unmap(ndm_i_backing *backing)
{
    if (backing->mapping)
        ndm_i_mapping_unref(backing->mapping);
    backing->mapping = NULL;
}

void ndm_i_backing_close(ndm_i_backing *backing, const char *unlink_path)
{
    ndm_i_backing_unmap(backing);
    free(backing->grains);
    backing->grains = NULL;
    if (unlink_path)
        unlink(unlink_path);
    if (backing->fd >= 0) {
        flock(backing->fd, LOCK_UN); /* a forked child may hold the same open file for long */
        close(backing->fd);
    }
    backing->fd = -1;
}
