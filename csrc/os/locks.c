/* See locks.h. */
#define _GNU_SOURCE
#include "os/locks.h"

#include "os/bits.h"
#include "os/patience.h"
#include "os/status.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/file.h>
#include <time.h>

bool ndm_i_file_lock_byte(const ndm_i_file *file, uint64_t byte, bool lock)
{
    struct flock range = {
        .l_type = lock ? F_WRLCK : F_UNLCK, .l_whence = SEEK_SET, .l_start = (off_t)byte, .l_len = 1};
    return fcntl(file->fd, F_OFD_SETLK, &range) == 0;
}

/* The kernel would wait for ever (F_OFD_SETLKW): who has the lock may be stopped. Otherwise it is held for microseconds. */
int ndm_i_file_await_byte(const ndm_i_file *file, uint64_t byte, uint64_t nanoseconds)
{
    enum { YIELDS = 50, LONGEST_PAUSE = 1000000 };
    long pause = 20000;
    uint64_t start = 0;
    for (int tries = 0; !ndm_i_file_lock_byte(file, byte, true); tries++) {
        if (errno != EAGAIN && errno != EACCES)
            return errno;
        if (tries < YIELDS) {
            sched_yield();
            continue;
        }
        if (start == 0)
            start = ndm_i_now();
        else if (ndm_i_now() - start >= nanoseconds)
            return ETIMEDOUT;
        nanosleep(&(struct timespec){.tv_nsec = pause}, NULL);
        pause = 2 * pause < LONGEST_PAUSE ? 2 * pause : LONGEST_PAUSE;
    }
    return 0;
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
