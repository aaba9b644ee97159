/* See bytes.h. */
#define _GNU_SOURCE
#include "os/bytes.h"

#include "os/bits.h"
#include "os/status.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

bool ndm_i_file_is_over_limit(uint64_t end)
{
    struct rlimit limit;
    return getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY && end > limit.rlim_cur;
}

int ndm_i_file_write(const ndm_i_file *file, const uint8_t *data, uint64_t size, uint64_t offset)
{
    static const uint8_t zeros[NDM_I_GRAIN];
    if (ndm_i_file_is_over_limit(offset + size))
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

int ndm_i_file_allocate_beyond(const ndm_i_file *file, uint64_t start, uint64_t end)
{
    while (file->can_allocate && fallocate(file->fd, FALLOC_FL_KEEP_SIZE, (off_t)start, (off_t)(end - start)) != 0)
        if (errno != EINTR)
            return errno == EOPNOTSUPP ? 0 : errno;
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
