/* The system calls of a fuzzed region. The files are real; blocks are only counted, so that a disk of any size can be
 * full, and a store that would have been SIGBUS there ends the run here. */
#define NDM_FUZZ_DISK
#include "faults.h"

#include "disk.h"

#include <errno.h>
#include <linux/falloc.h>
#include <linux/magic.h>
#include <stdio.h>

#define GRAIN ((uint64_t)512 << 10)
struct disk disk;

static uint8_t has[DISK_FILES][DISK_BLOCKS];

void disk_reset(void)
{
    disk.free_blocks = UINT64_MAX / 2;
    disk.address_limit = SIZE_MAX;
    disk.fail = 0;
    disk.in_memory = disk.moves_blocks = disk.no_allocate = disk.no_punch = false;
}

static bool fails(int kind)
{
    if (!(disk.fail & kind) || disk.fail_after-- > 0)
        return false;
    disk.fail = 0;
    disk.fired[__builtin_ctz((unsigned)kind)]++;
    errno = disk.fail_errno;
    return true;
}

static uint8_t *blocks_of(int fd)
{
    if (fd < 0 || fd >= DISK_FILES) {
        fprintf(stderr, "descriptor %d: too many are open\n", fd);
        abort();
    }
    return has[fd];
}

/* Get blocks for [start, end), from the start on; returns where they end. */
static uint64_t get_blocks(int fd, uint64_t start, uint64_t end)
{
    uint8_t *blocks = blocks_of(fd);
    for (uint64_t block = start / DISK_BLOCK; block * DISK_BLOCK < end; block++) {
        if (block >= DISK_BLOCKS)
            abort();
        if (blocks[block])
            continue;
        if (disk.free_blocks == 0)
            return block * DISK_BLOCK > start ? block * DISK_BLOCK : start;
        disk.free_blocks--;
        blocks[block] = 1;
    }
    return end;
}

static void drop_blocks(int fd, uint64_t start, uint64_t end)
{
    uint8_t *blocks = blocks_of(fd);
    for (uint64_t block = (start + DISK_BLOCK - 1) / DISK_BLOCK; block < DISK_BLOCKS; block++) {
        if ((block + 1) * DISK_BLOCK > end)
            break;
        disk.free_blocks += blocks[block];
        blocks[block] = 0;
    }
}

ssize_t disk_pwrite(int fd, const void *data, size_t size, off_t offset)
{
    /* A value that is moving is written over itself: a device that fails there has lost it. */
    const ndm_i_mapping *mapping = disk.region ? disk.region->data.mapping : NULL;
    const bool moving = mapping && (const uint8_t *)data >= mapping->base &&
                        (const uint8_t *)data < mapping->base + mapping->length;
    if (!moving && fails(FAIL_PWRITE))
        return -1;
    const uint64_t end = get_blocks(fd, (uint64_t)offset, (uint64_t)offset + size);
    if (end == (uint64_t)offset && size > 0) {
        errno = ENOSPC;
        return -1;
    }
    return pwrite(fd, data, end - (uint64_t)offset, offset);
}

/* Part by part: a refusal after the first leaves a short write, as the system's does. */
ssize_t disk_pwritev(int fd, const struct iovec *parts, int count, off_t offset)
{
    ssize_t total = 0;
    for (int i = 0; i < count; i++) {
        const ssize_t done = disk_pwrite(fd, parts[i].iov_base, parts[i].iov_len, offset + total);
        if (done < 0)
            return total > 0 ? total : done;
        total += done;
        if ((size_t)done < parts[i].iov_len)
            break;
    }
    return total;
}

static int punch(int fd, off_t offset, off_t size)
{
    if (size == 0) { /* only asking */
        errno = EINVAL;
        return -1;
    }
    const bool broken = fails(FAIL_PUNCH);
    if (disk.no_punch) {
        errno = EOPNOTSUPP;
        return -1;
    }
    if (broken)
        size = size / 2 / DISK_BLOCK * DISK_BLOCK;
    if (size > 0 && fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size) != 0)
        abort();
    drop_blocks(fd, (uint64_t)offset, (uint64_t)(offset + size));
    if (broken)
        errno = EIO;
    return broken ? -1 : 0;
}

int disk_fallocate(int fd, int mode, off_t offset, off_t size)
{
    if (mode & FALLOC_FL_PUNCH_HOLE)
        return punch(fd, offset, size);
    if (fails(FAIL_ALLOCATE))
        return -1;
    if (disk.no_allocate || mode & FALLOC_FL_KEEP_SIZE) { /* beyond the end: here nobody stores while a file grows */
        errno = EOPNOTSUPP;
        return -1;
    }
    struct stat facts;
    if (size <= 0 || fstat(fd, &facts) != 0 || offset + size > facts.st_size)
        abort(); /* it would extend the file */
    if (get_blocks(fd, (uint64_t)offset, (uint64_t)(offset + size)) == (uint64_t)(offset + size))
        return 0;
    errno = ENOSPC; /* what it got it keeps, as on ext4 */
    return -1;
}

int disk_ftruncate(int fd, off_t size)
{
    struct stat facts;
    if (fstat(fd, &facts) != 0)
        abort();
    if (size > facts.st_size && fails(FAIL_SIZE))
        return -1;
    drop_blocks(fd, (uint64_t)size, UINT64_MAX);
    return ftruncate(fd, size);
}

int disk_fstat(int fd, struct stat *facts)
{
    if (!fails(FAIL_STAT))
        return fstat(fd, facts);
    errno = EIO;
    return -1;
}

int disk_fstatfs(int fd, struct statfs *facts)
{
    int status = fstatfs(fd, facts);
    if (disk.free_blocks <= DISK_BLOCKS)
        facts->f_bavail = disk.free_blocks * DISK_BLOCK / (uint64_t)facts->f_frsize;
    facts->f_type = disk.in_memory ? TMPFS_MAGIC : disk.moves_blocks ? BTRFS_SUPER_MAGIC : EXT4_SUPER_MAGIC;
    return status;
}

int disk_close(int fd)
{
    memset(blocks_of(fd), 0, DISK_BLOCKS);
    return close(fd);
}

/* ---- address space and memory --------------------------------------------------------------------------- */

/* As kernels may: what was at a fixed target is gone already when the call fails. */
static void *refuse_map(void *target, size_t length)
{
    if (target) {
        munmap(target, length);
        disk.mapped -= (int64_t)length;
    }
    errno = ENOMEM;
    return MAP_FAILED;
}

void *disk_mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
    if (length > disk.address_limit) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    if (fails(FAIL_MAP))
        return refuse_map(flags & MAP_FIXED ? address : NULL, length);
    void *place = mmap(address, length, protection, flags, fd, offset);
    if (place != MAP_FAILED && !(flags & MAP_FIXED))
        disk.mapped += (int64_t)length;
    return place;
}

void *disk_mremap(void *old, size_t old_length, size_t length, int flags, void *address)
{
    if (fails(FAIL_MAP) || length > disk.address_limit)
        return refuse_map(flags & MREMAP_FIXED ? address : NULL, length);
    void *place = mremap(old, old_length, length, flags, address);
    if (place != MAP_FAILED)
        disk.mapped += (flags & MREMAP_FIXED ? 0 : (int64_t)length) - (int64_t)old_length;
    return place;
}

int disk_munmap(void *address, size_t length)
{
    disk.mapped -= (int64_t)length;
    return munmap(address, length);
}

int disk_madvise(void *address, size_t length, int advice)
{
    return advice == MADV_POPULATE_WRITE ? 0 : madvise(address, length, advice);
}

void *disk_malloc(size_t size) { return fails(FAIL_MEMORY) ? NULL : malloc(size); }
void *disk_calloc(size_t count, size_t size) { return fails(FAIL_MEMORY) ? NULL : calloc(count, size); }
void *disk_realloc(void *old, size_t size) { return fails(FAIL_MEMORY) ? NULL : realloc(old, size); }

/* ---- stores --------------------------------------------------------------------------------------------- */

static bool has_all(const ndm_region *region, uint64_t start, uint64_t end)
{
    const uint8_t *blocks = blocks_of(region->data.fd);
    for (uint64_t block = start / DISK_BLOCK; block * DISK_BLOCK < end; block++)
        if (!blocks[block])
            return false;
    return true;
}

/* A store may touch a folio that fills its grain: every block there has to exist. */
static void check_store(const void *to, uint64_t size)
{
    const ndm_region *region = disk.region;
    if (!region || size == 0 || !region->data.mapping || (const uint8_t *)to < region->data.mapping->base ||
        (const uint8_t *)to >= region->data.mapping->base + region->data.mapping->length)
        return;
    const uint64_t offset = (uint64_t)((const uint8_t *)to - region->data.mapping->base);
    const uint64_t end = (offset + size + GRAIN - 1) / GRAIN * GRAIN;
    if (disk.moves_blocks || offset + size > region->data.capacity ||
        !has_all(region, offset / GRAIN * GRAIN, end < region->data.capacity ? end : region->data.capacity)) {
        fprintf(stderr, "SIGBUS on a full disk: a store of %lu bytes at %lu\n", size, offset);
        abort();
    }
}

void *disk_memcpy(void *to, const void *from, size_t size)
{
    check_store(to, size);
    return memcpy(to, from, size);
}

void *disk_memmove(void *to, const void *from, size_t size)
{
    check_store(to, size);
    return memmove(to, from, size);
}

void *disk_memset(void *to, int value, size_t size)
{
    check_store(to, size);
    return memset(to, value, size);
}

bool disk_is_sound(const ndm_region *region)
{
    const ndm_i_file *data = &region->data;
    for (uint64_t start = 0; start < data->capacity; start += GRAIN) {
        const uint64_t end = start + GRAIN < data->capacity ? start + GRAIN : data->capacity;
        if (region->store.grains.states[start / GRAIN] >= NDM_I_READY && !has_all(region, start, end)) {
            fprintf(stderr, "the ready grain at %lu lacks blocks below %lu\n", start, end);
            return false;
        }
    }
    return true;
}
