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

enum { NDM_I_EMPTY, NDM_I_READY };

/* The grain of `pages`: at least the system's page, because a store into a page dirties all of it. */
#if defined(__x86_64__)
#define PAGE ((uint64_t)4 << 10)
#else
#define PAGE ((uint64_t)64 << 10)
#endif
#define HUGE_PAGE ((uint64_t)2 << 20)

/* Measured on ext4, us per MiB of cold 64 B to 1 MiB values: memcpy into a sparse mapping 300, into fallocated
 * space 225, into fallocated space zeroed by pwrite 120. Asking for blocks in large pieces keeps the file's
 * extents few; zeroing in pieces that fit the cache lets the memcpy that follows find them there. */
#define ALLOCATE_STEP ((uint64_t)16 << 20)
#define ZERO_STEP ((uint64_t)512 << 10)

/* From this size up a value is written by pwrite, which needs no zeroing first and leaves the pages out of this
 * process's RSS. Below, copying into zeroed space is faster (values rarely start on a page). */
#define PWRITE_FROM ((uint64_t)256 << 10)
#define PWRITE_FROM_IN_MEMORY ((uint64_t)4 << 10) /* tmpfs zeroes whole pages unless pwrite fills them */

static uint64_t round_up(uint64_t value, uint64_t grain) { return (value + grain - 1) / grain * grain; }

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
    backing->can_allocate = true;
    return NDM_OK;
}

int ndm_i_backing_open(ndm_i_backing *backing, const char *path, bool create, bool lock)
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
    if (lock && flock(backing->fd, LOCK_EX | LOCK_NB) != 0) {
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

/* pwrite all of it. `data` NULL means zeros. Returns 0 or errno. */
static int write_all(int fd, const uint8_t *data, uint64_t size, uint64_t offset)
{
    static const uint8_t zeros[64 << 10];
    while (size > 0) {
        ssize_t done = data ? pwrite(fd, data, size, (off_t)offset)
                            : pwrite(fd, zeros, min(size, sizeof zeros), (off_t)offset);
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

static uint64_t page_count(uint64_t capacity) { return round_up(capacity, PAGE) / PAGE; }

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
    backing->pages = calloc(page_count(capacity), 1);
    if (!backing->pages)
        return ndm_i_fail(NDM_ERR_MEMORY, "no memory for page states");
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
    uint64_t old_count = page_count(backing->capacity);
    uint8_t *pages = realloc(backing->pages, page_count(wanted));
    if (!pages)
        return ndm_i_fail(NDM_ERR_MEMORY, "no memory for page states");
    memset(pages + old_count, NDM_I_EMPTY, page_count(wanted) - old_count);
    backing->pages = pages;

    int refused = set_size(backing->fd, wanted);
    if (refused && wanted > needed) {
        wanted = needed;
        refused = set_size(backing->fd, wanted);
    }
    /* A page that the old end cut: the file system may have given a block to its first part only. */
    uint64_t rest = min(round_up(backing->capacity, PAGE), wanted);
    if (!refused && rest > backing->capacity)
        refused = write_all(backing->fd, NULL, rest - backing->capacity, backing->capacity);
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

/* Ask for blocks in large steps. A refusal is no failure: the writes that follow find out exactly. */
static void allocate_ahead(ndm_i_backing *backing, uint64_t end)
{
    if (!backing->can_allocate || backing->in_memory || end <= backing->allocated)
        return;
    uint64_t upto = min(round_up(end, ALLOCATE_STEP), backing->capacity);
    if (fallocate(backing->fd, 0, (off_t)backing->allocated, (off_t)(upto - backing->allocated)) != 0)
        backing->can_allocate = errno != EOPNOTSUPP;
    backing->allocated = upto;
}

/* Give the empty pages [first, last) blocks and bring them into the page cache. */
static int make_ready(ndm_i_backing *backing, uint64_t first, uint64_t last)
{
    uint64_t start = first * PAGE, end = min(last * PAGE, backing->capacity);
    int refused = 0;
    if (backing->in_memory) {
        if (fallocate(backing->fd, 0, (off_t)start, (off_t)(end - start)) != 0)
            refused = errno;
        else
            madvise(backing->mapping->base + start, (last - first) * PAGE, MADV_POPULATE_WRITE);
    } else {
        refused = write_all(backing->fd, NULL, end - start, start);
    }
    if (refused == 0)
        memset(backing->pages + first, NDM_I_READY, last - first);
    return refused;
}

/* The first page from `page` on, below `end`, that is (or is not) empty. */
static uint64_t skip(const ndm_i_backing *backing, uint64_t page, uint64_t end, uint8_t state)
{
    while (page < end && backing->pages[page] == state)
        page++;
    return page;
}

int ndm_i_backing_prepare(ndm_i_backing *backing, uint64_t offset, uint64_t size)
{
    const uint64_t end = page_count(offset + size);
    uint64_t page = skip(backing, offset / PAGE, end, NDM_I_READY);
    if (page == end)
        return NDM_OK;
    int status = check_writable(backing, offset + size);
    if (status != NDM_OK)
        return status;
    allocate_ahead(backing, offset + size);
    while (page < end) {
        uint64_t needed = skip(backing, page, end, NDM_I_EMPTY);
        uint64_t ahead = min(round_up((page + 1) * PAGE, ZERO_STEP) / PAGE, page_count(backing->capacity));
        uint64_t stop = needed < end || ahead <= end ? needed : skip(backing, end, ahead, NDM_I_EMPTY);
        int refused = make_ready(backing, page, stop);
        if (refused && stop > needed)
            refused = make_ready(backing, page, needed); /* the disk is nearly full: only what must be */
        if (refused)
            return ndm_i_fail_io(refused, "cannot get room in the file");
        page = skip(backing, needed, end, NDM_I_READY);
    }
    return NDM_OK;
}

int ndm_i_backing_store(ndm_i_backing *backing, uint64_t offset, const void *data, uint64_t size)
{
    const uint64_t first = offset / PAGE, end = page_count(offset + size);
    const uint64_t direct = backing->in_memory ? PWRITE_FROM_IN_MEMORY : PWRITE_FROM;
    if (size < direct || skip(backing, first, end, NDM_I_READY) == end) {
        int status = ndm_i_backing_prepare(backing, offset, size);
        if (status != NDM_OK)
            return status;
        memcpy(backing->mapping->base + offset, data, size);
        return NDM_OK;
    }
    int status = check_writable(backing, offset + size);
    if (status != NDM_OK)
        return status;
    allocate_ahead(backing, offset + size);
    int refused = write_all(backing->fd, data, size, offset);
    if (refused)
        return ndm_i_fail_io(refused, "cannot write to the file");
    memset(backing->pages + first, NDM_I_READY, end - first);
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
    free(backing->pages);
    backing->pages = NULL;
    if (unlink_path)
        unlink(unlink_path);
    if (backing->fd >= 0) {
        flock(backing->fd, LOCK_UN); /* a forked child may hold the same open file for long */
        close(backing->fd);
    }
    backing->fd = -1;
}
