/* See file.h. */
#define _GNU_SOURCE
#include "os/file.h"

#include "os/bits.h"
#include "os/fork.h"
#include "os/medium.h"
#include "os/owner.h"
#include "os/status.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h> /* memfd_create */
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <sys/vfs.h>
#include <unistd.h>

#define XFS_MAGIC 0x58465342 /* not in linux/magic.h of older headers */
#ifndef OVERLAYFS_SUPER_MAGIC
#define OVERLAYFS_SUPER_MAGIC 0x794c7630
#endif

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

static int examine(ndm_i_file *file)
{
    struct statx facts;
    struct statfs system;
    if (statx(file->fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS | STATX_BTIME, &facts) != 0 ||
        fstatfs(file->fd, &system) != 0)
        return ndm_i_fail_io(errno, "cannot examine the file");
    if (!S_ISREG(facts.stx_mode))
        return ndm_i_fail_io(EINVAL, "not a regular file");
    file->process = ndm_i_process();
    file->capacity = facts.stx_size;
    file->linked = facts.stx_nlink > 0;
    file->user = facts.stx_uid;
    file->inode = facts.stx_ino;
    if (facts.stx_mask & STATX_BTIME)
        file->born = (uint64_t)facts.stx_btime.tv_sec * 1000000000u + facts.stx_btime.tv_nsec;
    file->modified = (uint64_t)facts.stx_mtime.tv_sec * 1000000000u + facts.stx_mtime.tv_nsec;
    const int medium = ndm_i_medium(file->fd);
    file->in_memory = medium != NDM_MEDIUM_DISK;
    file->holes_need_room = file->in_memory || system.f_type == OVERLAYFS_SUPER_MAGIC; /* which may lie on a tmpfs */
    /* ext2, ext3 and ext4 share their number. */
    file->keeps_blocks = medium == NDM_MEDIUM_TMPFS || system.f_type == EXT4_SUPER_MAGIC || system.f_type == XFS_MAGIC;
    file->can_allocate = file->can_punch = true;
    file->large_folios = has_large_folios(file->fd, (uint64_t)system.f_type);
    posix_fadvise(file->fd, 0, 0, POSIX_FADV_RANDOM); /* no readahead into neighbours */
    return NDM_OK;
}

bool ndm_i_file_is_own(const ndm_i_file *file) { return file->user == geteuid(); }

bool ndm_i_file_is_linked(const ndm_i_file *file)
{
    struct stat facts;
    return fstat(file->fd, &facts) == 0 && facts.st_nlink > 0;
}

bool ndm_i_file_lock_byte(const ndm_i_file *file, uint64_t byte, bool lock)
{
    struct flock range = {
        .l_type = lock ? F_WRLCK : F_UNLCK, .l_whence = SEEK_SET, .l_start = (off_t)byte, .l_len = 1};
    return fcntl(file->fd, F_OFD_SETLK, &range) == 0;
}

int ndm_i_file_await_byte(const ndm_i_file *file, uint64_t byte)
{
    struct flock range = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = (off_t)byte, .l_len = 1};
    while (fcntl(file->fd, F_OFD_SETLKW, &range) != 0)
        if (errno != EINTR)
            return errno;
    return 0;
}

bool ndm_i_file_reopen(ndm_i_file *file)
{
    char link[sizeof "/proc/self/fd/" + 12];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file->fd);
    const int fd = open(link, O_RDWR | O_CLOEXEC | O_NOCTTY), refused = errno;
    close(file->fd); /* the parent's locks live as long as a copy of its open file does */
    file->fd = fd;
    file->process = ndm_i_process();
    errno = refused;
    return fd >= 0;
}

bool ndm_i_file_find_lock(const ndm_i_file *file, uint64_t *start, uint64_t *end)
{
    /* What a read lock would meet is a write lock. */
    struct flock range = {
        .l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = (off_t)*start, .l_len = (off_t)(*end - *start)};
    if (fcntl(file->fd, F_OFD_GETLK, &range) != 0)
        return true;
    if (range.l_type == F_UNLCK)
        return false;
    const uint64_t first = (uint64_t)range.l_start;
    if (range.l_len > 0) /* 0: to the end of all files */
        *end = ndm_i_min(*end, first + (uint64_t)range.l_len);
    *start = ndm_i_max(*start, first);
    return true;
}

bool ndm_i_file_is_byte_locked(const ndm_i_file *file, uint64_t byte)
{
    uint64_t end = byte + 1;
    return ndm_i_file_find_lock(file, &byte, &end);
}

uint64_t ndm_i_file_size(const ndm_i_file *file)
{
    const off_t end = lseek(file->fd, 0, SEEK_END); /* 110 ns; fstat 290. Nobody uses the file's position. */
    return end > 0 ? (uint64_t)end : 0;
}

/* false with errno EWOULDBLOCK or EACCES: somebody else has it. */
static bool lock_file(const ndm_i_file *file, int lock)
{
    if (lock == NDM_I_LOCK_FILE)
        return flock(file->fd, LOCK_EX | LOCK_NB) == 0;
    return lock == NDM_I_LOCK_NONE || ndm_i_file_lock_byte(file, 0, true);
}

/* Open and note a descriptor. false with errno. */
static bool open_at(ndm_i_file *file, const char *path, int flags)
{
    ndm_i_fork_bar();
    *file = (ndm_i_file){.fd = open(path, flags | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0600)};
    ndm_i_fork_let();
    return file->fd >= 0;
}

int ndm_i_file_open(ndm_i_file *file, const char *path, bool create, int lock)
{
    const int flags = O_RDWR | O_NOFOLLOW;
    int status;
    /* O_EXCL tells whether the file is ours to remove if something fails later. */
    const bool created = create && open_at(file, path, flags | O_CREAT | O_EXCL);
    if (!created && (!create || errno == EEXIST))
        open_at(file, path, flags);
    if (file->fd < 0)
        return ndm_i_fail_io(errno, "cannot open the file");
    if ((file->created = created))
        fchmod(file->fd, 0600); /* whatever the umask takes; a refusal is no failure: not every file system has modes */
    if ((status = examine(file)) != NDM_OK)
        goto fail;
    if (!ndm_i_file_is_own(file)) { /* who made it may read it, or cut it short */
        status = ndm_i_fail_io(EPERM, "the file belongs to another user");
        goto fail;
    }
    if (!lock_file(file, lock)) {
        status = errno == EWOULDBLOCK || errno == EACCES ? ndm_i_fail(NDM_ERR_BUSY, "the file is locked by another region")
                                      : ndm_i_fail_io(errno, "cannot lock the file");
        file->created = false; /* somebody else's by now */
        goto fail;
    }
    /* Whoever held the lock until now may have resized the file, or failed to open it and removed it. */
    if ((status = examine(file)) != NDM_OK)
        goto fail;
    if (!file->linked) {
        status = ndm_i_fail(NDM_ERR_BUSY, "the file was removed while it was opened");
        file->created = false; /* what stands at the path by now is somebody else's */
        goto fail;
    }
    return NDM_OK;

fail:
    ndm_i_file_close(file, file->created ? path : NULL);
    return status;
}

static int open_shared(ndm_i_file *file, const char *path, int mode)
{
    if (!open_at(file, path, mode))
        return ndm_i_fail_io(errno, "cannot open the file");
    int status = examine(file);
    if (status != NDM_OK)
        ndm_i_file_close(file, NULL);
    return status;
}

int ndm_i_file_open_to_read(ndm_i_file *file, const char *path) { return open_shared(file, path, O_RDONLY); }

int ndm_i_file_open_to_lease(ndm_i_file *file, const char *path) { return open_shared(file, path, O_RDWR); }

bool ndm_i_file_flock(const ndm_i_file *file, bool whole)
{
    return flock(file->fd, whole ? LOCK_EX | LOCK_NB : LOCK_UN) == 0;
}

int ndm_i_file_flock_to_read(const ndm_i_file *file)
{
    if (flock(file->fd, LOCK_SH | LOCK_NB) == 0)
        return NDM_OK;
    return errno == EWOULDBLOCK ? ndm_i_fail(NDM_ERR_WAIT, "another process keeps readers out of the slot table")
                                : ndm_i_fail_io(errno, "cannot lock the file for reading");
}

static int unnamed_file(const char *directory)
{
    int fd = open(directory, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (fd >= 0)
        fchmod(fd, 0600); /* readers open it by its number */
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

int ndm_i_file_open_unnamed(ndm_i_file *file, const char *directory)
{
    ndm_i_fork_bar();
    *file = (ndm_i_file){.fd = directory ? unnamed_file(directory) : memfd_create("nodedb_mem", MFD_CLOEXEC)};
    ndm_i_fork_let();
    if (file->fd < 0)
        return ndm_i_fail_io(errno, "cannot create an unnamed file");
    int status = examine(file);
    if (status != NDM_OK)
        ndm_i_file_close(file, NULL);
    return status;
}

int ndm_i_file_has_data(const ndm_i_file *file)
{
    if (lseek(file->fd, 0, SEEK_DATA) >= 0)
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

int ndm_i_file_check_writable(const ndm_i_file *file, uint64_t end)
{
    struct stat facts;
    if (fstat(file->fd, &facts) != 0)
        return ndm_i_fail_io(errno, "cannot examine the file");
    if ((uint64_t)facts.st_size < file->capacity)
        return ndm_i_fail_io(EIO, "the file was shortened by someone else");
    if (over_size_limit(end))
        return ndm_i_fail_io(EFBIG, "the process's file size limit is below the file's size");
    return NDM_OK;
}

void ndm_i_file_overwrite_in_place(const ndm_i_file *file)
{
    int flags = 0;
    if (file->keeps_blocks || ioctl(file->fd, FS_IOC_GETFLAGS, &flags) != 0)
        return;
    flags |= FS_NOCOW_FL;
    ioctl(file->fd, FS_IOC_SETFLAGS, &flags); /* a refusal is no failure: not every file system copies on write */
}

int ndm_i_file_start(ndm_i_file *file, uint64_t capacity, uint64_t ceiling)
{
    const uint64_t before = file->capacity;
    const int refused = before >= capacity ? 0 : set_size(file->fd, capacity);
    if (refused)
        return ndm_i_fail_io(refused, "cannot size the file");
    file->capacity = ndm_i_max(before, capacity);
    const ndm_error last = *ndm_last_error();
    ndm_i_fork_bar();
    file->mapping = ndm_i_mapping_new(file->fd, ndm_i_max(ceiling, file->capacity));
    if (!file->mapping && ceiling > file->capacity)
        file->mapping = ndm_i_mapping_new(file->fd, file->capacity); /* RLIMIT_AS: growth will remap */
    ndm_i_fork_let();
    if (file->mapping)
        return (int)ndm_i_ended(NDM_OK, &last);
    if (before < capacity)
        ndm_i_file_shrink(file, before);
    return ndm_last_error()->status;
}

int ndm_i_file_empty(const ndm_i_file *file)
{
    if (ftruncate(file->fd, 0) != 0)
        return ndm_i_fail_io(errno, "cannot empty the file");
    const int refused = set_size(file->fd, file->capacity);
    return refused ? ndm_i_fail_io(refused, "cannot size the file") : NDM_OK;
}

/* Give the file this size, and address space for it. */
static int grow_to(ndm_i_file *file, uint64_t size, uint64_t ceiling)
{
    const int refused = set_size(file->fd, size);
    if (refused)
        return ndm_i_fail_io(refused, "cannot extend the file");
    const ndm_error before = *ndm_last_error();
    int status = size > file->mapping->length ? ndm_i_mapping_extend(&file->mapping, ceiling) : NDM_OK;
    if (status != NDM_OK && ceiling > size)
        status = (int)ndm_i_ended(ndm_i_mapping_extend(&file->mapping, size), &before);
    if (status != NDM_OK)
        ndm_i_file_shrink(file, file->capacity);
    else
        file->capacity = size;
    return status;
}

int ndm_i_file_grow(ndm_i_file *file, uint64_t needed, uint64_t wanted, uint64_t ceiling)
{
    int status = ndm_i_file_check_writable(file, file->capacity);
    if (status != NDM_OK)
        return status;
    const uint64_t spare = wanted - needed;
    const ndm_error before = *ndm_last_error();
    status = grow_to(file, wanted, ceiling);
    for (uint64_t share = 2; status != NDM_OK && spare > 0 && share <= 4; share *= 2)
        status = grow_to(file, needed + spare / share, ceiling);
    if (status != NDM_OK && spare > 0)
        status = grow_to(file, needed, ceiling);
    return (int)ndm_i_ended(status, &before);
}

void ndm_i_file_shrink(ndm_i_file *file, uint64_t capacity)
{
    if (ftruncate(file->fd, (off_t)capacity) != 0)
        return; /* too long is harmless */
    file->capacity = capacity;
}

/* ---- contents ------------------------------------------------------------------------------------------- */

int ndm_i_file_write(const ndm_i_file *file, const uint8_t *data, uint64_t size, uint64_t offset)
{
    static const uint8_t zeros[NDM_I_GRAIN];
    if (over_size_limit(offset + size))
        return EFBIG;
    while (size > 0) {
        const uint64_t piece = ndm_i_min(size, NDM_I_GRAIN - offset % NDM_I_GRAIN);
        const ssize_t done = pwrite(file->fd, data ? data : zeros, piece, (off_t)offset);
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

int64_t ndm_i_file_load_some(const ndm_i_file *file, uint64_t offset, void *buffer, uint64_t size)
{
    uint64_t loaded = 0;
    while (loaded < size) {
        const ssize_t done = pread(file->fd, (uint8_t *)buffer + loaded, size - loaded, (off_t)(offset + loaded));
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0)
            return -1;
        if (done == 0)
            break;
        loaded += (uint64_t)done;
    }
    return (int64_t)loaded;
}

int ndm_i_file_load(const ndm_i_file *file, uint64_t offset, void *buffer, uint64_t size)
{
    const int64_t loaded = ndm_i_file_load_some(file, offset, buffer, size);
    if (loaded >= 0 && (uint64_t)loaded == size)
        return NDM_OK;
    return ndm_i_fail_io(loaded < 0 ? errno : EIO, "cannot read the file");
}

int ndm_i_file_allocate(ndm_i_file *file, uint64_t start, uint64_t end)
{
    while (file->can_allocate && fallocate(file->fd, 0, (off_t)start, (off_t)(end - start)) != 0) {
        if (errno == EOPNOTSUPP)
            file->can_allocate = false;
        else if (errno != EINTR)
            return errno;
    }
    return 0;
}

/* Each piece is written as it is. */
static int rewrite(const ndm_i_file *file)
{
    uint8_t piece[4096];
    int refused = 0;
    for (uint64_t start = 0; start < file->capacity && !refused; start += sizeof piece) {
        const uint64_t size = ndm_i_min(sizeof piece, file->capacity - start);
        refused = ndm_i_file_load(file, start, piece, size) == NDM_OK ? ndm_i_file_write(file, piece, size, start)
                                                                      : ndm_last_error()->os_errno;
    }
    return refused;
}

int ndm_i_file_get_blocks(ndm_i_file *file)
{
    const int refused = ndm_i_file_allocate(file, 0, file->capacity);
    return refused || file->can_allocate ? refused : rewrite(file);
}

bool ndm_i_file_can_punch(ndm_i_file *file)
{
    const uint64_t end = ndm_i_round_up(ndm_i_max(file->capacity, 1), NDM_I_GRAIN); /* nothing is there */
    ndm_i_file_punch(file, end, end + NDM_I_GRAIN);
    return file->can_punch;
}

bool ndm_i_file_punch(ndm_i_file *file, uint64_t start, uint64_t end)
{
    if (file->can_punch && fallocate(file->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)start,
                                        (off_t)(end - start)) == 0)
        return true;
    file->can_punch = file->can_punch && errno != EOPNOTSUPP;
    return false;
}

int ndm_i_file_write_back(const ndm_i_file *file, uint64_t start, uint64_t end, bool wait)
{
    const unsigned flags = wait ? SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER
                                : SYNC_FILE_RANGE_WRITE;
    return sync_file_range(file->fd, (off_t)start, (off_t)(end - start), flags) == 0 ? 0 : errno;
}

void ndm_i_file_drop(const ndm_i_file *file, const ndm_i_mapping *mapping, uint64_t start, uint64_t end)
{
    ndm_i_mapping_forget(mapping, mapping->base + start, end - start, false); /* mapped pages are not dropped */
    posix_fadvise(file->fd, (off_t)start, (off_t)(end - start), POSIX_FADV_DONTNEED);
}

int ndm_i_file_sync(const ndm_i_file *file) { return fdatasync(file->fd) == 0 ? 0 : errno; }

uint64_t ndm_i_file_disk_free(const ndm_i_file *file)
{
    struct statfs system;
    if (fstatfs(file->fd, &system) != 0 || system.f_blocks == 0) /* a file in memory has no limit of its own */
        return UINT64_MAX;
    return (uint64_t)system.f_bavail * (uint64_t)system.f_frsize;
}

int ndm_i_file_disk_bytes(const ndm_i_file *file, uint64_t *bytes)
{
    struct stat facts;
    if (fstat(file->fd, &facts) != 0)
        return ndm_i_fail_io(errno, "cannot examine the file");
    *bytes = (uint64_t)facts.st_blocks * 512;
    return NDM_OK;
}

/* ---- the end -------------------------------------------------------------------------------------------- */

void ndm_i_file_unmap(ndm_i_file *file)
{
    ndm_i_fork_bar();
    ndm_i_mapping *mapping = file->mapping;
    file->mapping = NULL;
    ndm_i_mapping_unref(mapping);
    ndm_i_fork_let();
}

void ndm_i_file_close(ndm_i_file *file, const char *unlink_path)
{
    ndm_i_file_unmap(file);
    if (unlink_path)
        unlink(unlink_path);
    if (file->fd >= 0 && ndm_i_is_process(file->process)) {
        flock(file->fd, LOCK_UN); /* a child that was forked without our handlers may hold the same open file for long */
        ndm_i_file_lock_byte(file, 0, false);
    }
    ndm_i_file_abandon(file);
}

/* In a child that ran no handlers the bar is none: better a descriptor too many there than a stranger's that is closed. */
void ndm_i_file_abandon(ndm_i_file *file)
{
    ndm_i_fork_bar();
    const int fd = file->fd;
    file->fd = -1;
    atomic_signal_fence(memory_order_seq_cst);
    if (fd >= 0)
        close(fd);
    ndm_i_fork_let();
}
