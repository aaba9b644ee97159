#define _GNU_SOURCE
#include "os/file.h"

#include "os/status.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/vfs.h>
#include <unistd.h>

#define XFS_MAGIC 0x58465342 /* not in linux/magic.h of older headers */

static uint64_t round_up(uint64_t value, uint64_t grain) { return (value + grain - 1) / grain * grain; }

static uint64_t round_down(uint64_t value, uint64_t grain) { return value / grain * grain; }

static uint64_t min(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* ---- opening -------------------------------------------------------------------------------------------- */

/* XFS has them since Linux 5.18, ext4 since 6.16; ext2 and ext3 do not, and know no fallocate() either. */
static bool has_large_folios(int fd, uint64_t type)
{
    struct utsname system;
    int major = 0, minor = 0;
    if (uname(&system) != 0 || sscanf(system.release, "%d.%d", &major, &minor) != 2)
        return false;
    const int version = major * 1000 + minor;
    if (type == XFS_MAGIC)
        return version >= 5018;
    return type == EXT4_SUPER_MAGIC && version >= 6016 &&
           !(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 0) != 0 && errno == EOPNOTSUPP);
}

int ndm_path_in_memory(const char *path)
{
    struct statfs system;
    if (statfs(path, &system) == 0)
        return system.f_type == TMPFS_MAGIC;
    char folder[PATH_MAX] = ".";
    const char *name = strrchr(path, '/');
    if (name && (size_t)(name - path) + 1 < sizeof folder) {
        memcpy(folder, path, (size_t)(name - path) + 1);
        folder[name - path + 1] = 0;
    }
    return errno == ENOENT && statfs(folder, &system) == 0 && system.f_type == TMPFS_MAGIC;
}

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
    backing->linked = facts.stx_nlink > 0;
    backing->own = facts.stx_uid == geteuid();
    backing->inode = facts.stx_ino;
    if (facts.stx_mask & STATX_BTIME)
        backing->born = (uint64_t)facts.stx_btime.tv_sec * 1000000000u + facts.stx_btime.tv_nsec;
    backing->in_memory = system.f_type == TMPFS_MAGIC;
    /* ext2, ext3 and ext4 share their number. */
    backing->keeps_blocks = backing->in_memory || system.f_type == EXT4_SUPER_MAGIC || system.f_type == XFS_MAGIC;
    backing->can_allocate = backing->can_punch = true;
    backing->large_folios = has_large_folios(backing->fd, (uint64_t)system.f_type);
    posix_fadvise(backing->fd, 0, 0, POSIX_FADV_RANDOM); /* no readahead into neighbours */
    return NDM_OK;
}

bool ndm_i_backing_lock_byte(const ndm_i_backing *backing, uint64_t byte, bool lock)
{
    struct flock range = {
        .l_type = lock ? F_WRLCK : F_UNLCK, .l_whence = SEEK_SET, .l_start = (off_t)byte, .l_len = 1};
    return fcntl(backing->fd, F_OFD_SETLK, &range) == 0;
}

bool ndm_i_backing_is_byte_locked(const ndm_i_backing *backing, uint64_t byte)
{
    struct flock range = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = (off_t)byte, .l_len = 1};
    return fcntl(backing->fd, F_OFD_GETLK, &range) == 0 && range.l_type != F_UNLCK;
}

uint64_t ndm_i_backing_size(const ndm_i_backing *backing)
{
    const off_t end = lseek(backing->fd, 0, SEEK_END); /* 110 ns; fstat 290. Nobody uses the file's position. */
    return end > 0 ? (uint64_t)end : 0;
}

/* false with errno EWOULDBLOCK or EACCES: somebody else has it. */
static bool lock_file(const ndm_i_backing *backing, int lock)
{
    if (lock == NDM_I_LOCK_FILE)
        return flock(backing->fd, LOCK_EX | LOCK_NB) == 0;
    return lock == NDM_I_LOCK_NONE || ndm_i_backing_lock_byte(backing, 0, true);
}

int ndm_i_backing_open(ndm_i_backing *backing, const char *path, bool create, int lock)
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
    if (!backing->own) { /* who made it may read it, or cut it short */
        status = ndm_i_fail_io(EPERM, "the file belongs to another user");
        goto fail;
    }
    if (!lock_file(backing, lock)) {
        status = errno == EWOULDBLOCK || errno == EACCES ? ndm_i_fail(NDM_ERR_BUSY, "the file is locked by another region")
                                      : ndm_i_fail_io(errno, "cannot lock the file");
        backing->created = false; /* somebody else's by now */
        goto fail;
    }
    /* Whoever held the lock until now may have resized the file, or failed to open it and removed it. */
    if ((status = examine(backing)) != NDM_OK)
        goto fail;
    if (!backing->linked) {
        status = ndm_i_fail(NDM_ERR_BUSY, "the file was removed while it was opened");
        backing->created = false; /* what stands at the path by now is somebody else's */
        goto fail;
    }
    return NDM_OK;

fail:
    ndm_i_backing_close(backing, backing->created ? path : NULL);
    return status;
}

static int open_shared(ndm_i_backing *backing, const char *path, int mode)
{
    *backing = (ndm_i_backing){.fd = open(path, mode | O_CLOEXEC | O_NONBLOCK | O_NOCTTY)};
    if (backing->fd < 0)
        return ndm_i_fail_io(errno, "cannot open the file");
    int status = examine(backing);
    if (status != NDM_OK)
        ndm_i_backing_close(backing, NULL);
    return status;
}

int ndm_i_backing_open_to_read(ndm_i_backing *backing, const char *path) { return open_shared(backing, path, O_RDONLY); }

int ndm_i_backing_open_to_lease(ndm_i_backing *backing, const char *path) { return open_shared(backing, path, O_RDWR); }

bool ndm_i_backing_flock(const ndm_i_backing *backing, bool whole)
{
    return flock(backing->fd, whole ? LOCK_EX | LOCK_NB : LOCK_UN) == 0;
}

int ndm_i_backing_flock_to_read(const ndm_i_backing *backing)
{
    while (flock(backing->fd, LOCK_SH) != 0)
        if (errno != EINTR)
            return ndm_i_fail_io(errno, "cannot lock the file for reading");
    return NDM_OK;
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

/* ---- size ----------------------------------------------------------------------------------------------- */

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
    while (ftruncate(fd, (off_t)size) != 0)
        if (errno != EINTR)
            return errno;
    return 0;
}

int ndm_i_backing_check_writable(const ndm_i_backing *backing, uint64_t end)
{
    struct stat facts;
    if (fstat(backing->fd, &facts) != 0)
        return ndm_i_fail_io(errno, "cannot examine the file");
    if ((uint64_t)facts.st_size < backing->capacity)
        return ndm_i_fail_io(EIO, "the file was shortened by someone else");
    if (over_size_limit(end))
        return ndm_i_fail_io(EFBIG, "the process's file size limit is below the file's size");
    return NDM_OK;
}

void ndm_i_backing_overwrite_in_place(const ndm_i_backing *backing)
{
    int flags = 0;
    if (backing->keeps_blocks || ioctl(backing->fd, FS_IOC_GETFLAGS, &flags) != 0)
        return;
    flags |= FS_NOCOW_FL;
    ioctl(backing->fd, FS_IOC_SETFLAGS, &flags); /* a refusal is no failure: not every file system copies on write */
}

int ndm_i_backing_start(ndm_i_backing *backing, uint64_t capacity, uint64_t ceiling, bool keep)
{
    if (!keep && backing->capacity > 0 && ftruncate(backing->fd, 0) != 0)
        return ndm_i_fail_io(errno, "cannot empty the file");
    int refused = keep && backing->capacity == capacity ? 0 : set_size(backing->fd, capacity);
    if (refused)
        return ndm_i_fail_io(refused, "cannot size the file");
    backing->capacity = capacity;
    int status = ndm_i_map_fresh(backing, ceiling);
    if (status != NDM_OK && ceiling > capacity)
        status = ndm_i_map_fresh(backing, capacity); /* RLIMIT_AS: growth will remap */
    return status;
}

int ndm_i_backing_grow(ndm_i_backing *backing, uint64_t needed, uint64_t wanted, uint64_t ceiling)
{
    int status = ndm_i_backing_check_writable(backing, backing->capacity);
    if (status != NDM_OK)
        return status;
    int refused = set_size(backing->fd, wanted);
    if (refused && wanted > needed) {
        wanted = needed;
        refused = set_size(backing->fd, wanted);
    }
    if (refused)
        return ndm_i_fail_io(refused, "cannot extend the file");
    if (wanted > backing->mapping->length) {
        status = ndm_i_remap(backing, ceiling);
        if (status != NDM_OK && ceiling > wanted)
            status = ndm_i_remap(backing, wanted);
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
}

/* ---- contents ------------------------------------------------------------------------------------------- */

int ndm_i_backing_write(const ndm_i_backing *backing, const uint8_t *data, uint64_t size, uint64_t offset)
{
    static const uint8_t zeros[NDM_I_GRAIN];
    if (over_size_limit(offset + size))
        return EFBIG;
    while (size > 0) {
        const uint64_t piece = min(size, NDM_I_GRAIN - offset % NDM_I_GRAIN);
        const ssize_t done = pwrite(backing->fd, data ? data : zeros, piece, (off_t)offset);
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

int ndm_i_backing_load(const ndm_i_backing *backing, uint64_t offset, void *buffer, uint64_t size)
{
    for (uint8_t *next = buffer; size > 0;) {
        const ssize_t done = pread(backing->fd, next, size, (off_t)offset);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return ndm_i_fail_io(done < 0 ? errno : EIO, "cannot read the file");
        next += done;
        size -= (uint64_t)done;
        offset += (uint64_t)done;
    }
    return NDM_OK;
}

int ndm_i_backing_allocate(ndm_i_backing *backing, uint64_t start, uint64_t end)
{
    while (backing->can_allocate && fallocate(backing->fd, 0, (off_t)start, (off_t)(end - start)) != 0) {
        if (errno == EOPNOTSUPP)
            backing->can_allocate = false;
        else if (errno != EINTR)
            return errno;
    }
    return 0;
}

void ndm_i_backing_populate(const ndm_i_backing *backing, uint64_t start, uint64_t end)
{
    madvise(backing->mapping->base + start, end - start, MADV_POPULATE_WRITE);
}

bool ndm_i_backing_punch(ndm_i_backing *backing, uint64_t start, uint64_t end)
{
    if (backing->can_punch && fallocate(backing->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)start,
                                        (off_t)(end - start)) == 0)
        return true;
    backing->can_punch = backing->can_punch && errno != EOPNOTSUPP;
    return false;
}

int ndm_i_backing_write_back(const ndm_i_backing *backing, uint64_t start, uint64_t end, bool wait)
{
    const unsigned flags = wait ? SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER
                                : SYNC_FILE_RANGE_WRITE;
    return sync_file_range(backing->fd, (off_t)start, (off_t)(end - start), flags) == 0 ? 0 : errno;
}

void ndm_i_backing_drop(const ndm_i_backing *backing, const ndm_i_mapping *mapping, uint64_t start, uint64_t end)
{
    ndm_i_mapping_forget(mapping->base + start, end - start); /* mapped pages are not dropped */
    posix_fadvise(backing->fd, (off_t)start, (off_t)(end - start), POSIX_FADV_DONTNEED);
}

int ndm_i_backing_sync(const ndm_i_backing *backing) { return fdatasync(backing->fd) == 0 ? 0 : errno; }

enum { FACCESSAT2 = 439, CACHESTAT = 451 }; /* the same numbers on every architecture; Linux 5.8, 6.5 */

bool ndm_i_backing_is_cached(const ndm_i_backing *backing, uint64_t start, uint64_t end)
{
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    struct {
        uint64_t offset, length;
    } range = {round_down(start, page), round_up(end, page) - round_down(start, page)};
    struct {
        uint64_t cached, dirty, writeback, evicted, recently_evicted;
    } counts;
    return syscall(CACHESTAT, backing->fd, &range, &counts, 0) == 0 && counts.cached * page >= range.length;
}

bool ndm_i_backing_in_core(const ndm_i_backing *backing, uint64_t start, uint64_t length, unsigned char *in_core)
{
    if (backing->mapping)
        return mincore(backing->mapping->base + start, length, in_core) == 0;
    void *place = mmap(NULL, length, PROT_READ, MAP_SHARED | MAP_NORESERVE, backing->fd, (off_t)start);
    const bool done = place != MAP_FAILED && mincore(place, length, in_core) == 0;
    if (place != MAP_FAILED) {
        const int refused = errno;
        munmap(place, length);
        errno = refused;
    }
    return done;
}

/* Does mincore() tell the truth? To those who neither own the file nor may write to it, it shows every page as resident.
 * O_NOATIME is for owners, in the sense of the kernel (CAP_FOWNER), and does nothing else for a file that is mapped. */
static bool may_see_residency(const ndm_i_backing *backing)
{
    const int flags = fcntl(backing->fd, F_GETFL);
    if (flags >= 0 && fcntl(backing->fd, F_SETFL, flags | O_NOATIME) == 0) {
        fcntl(backing->fd, F_SETFL, flags);
        return true;
    }
    return syscall(FACCESSAT2, backing->fd, "", W_OK, AT_EACCESS | AT_EMPTY_PATH) == 0;
}

/* The kernel's own count (Linux 6.5); only the resident pages, by mincore(), where it is missing. Neither is for those who
 * may not write to the file (cachestat: in newer kernels). */
int ndm_i_backing_residency(const ndm_i_backing *backing, uint64_t *resident, uint64_t *unwritten)
{
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    struct {
        uint64_t offset, length;
    } range = {0, backing->capacity};
    struct {
        uint64_t cached, dirty, writeback, evicted, recently_evicted;
    } counts;
    if (syscall(CACHESTAT, backing->fd, &range, &counts, 0) == 0) {
        *resident = counts.cached * page;
        *unwritten = (counts.dirty + counts.writeback) * page;
        return NDM_OK;
    }
    enum { AT_ONCE = 4096 };
    unsigned char in_core[AT_ONCE];
    *resident = *unwritten = 0;
    if (!may_see_residency(backing)) {
        *resident = UINT64_MAX;
        return NDM_OK;
    }
    for (uint64_t start = 0; start < backing->capacity; start += AT_ONCE * page) {
        const uint64_t length = min(AT_ONCE * page, backing->capacity - start);
        if (!ndm_i_backing_in_core(backing, start, length, in_core))
            return ndm_i_fail_io(errno, "cannot ask what is resident");
        for (uint64_t i = 0; i < round_up(length, page) / page; i++)
            *resident += (in_core[i] & 1) * page;
    }
    return NDM_OK;
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
    if (unlink_path)
        unlink(unlink_path);
    if (backing->fd >= 0) {
        flock(backing->fd, LOCK_UN); /* a forked child may hold the same open file for long */
        ndm_i_backing_lock_byte(backing, 0, false);
        close(backing->fd);
    }
    backing->fd = -1;
}
