/* See identity.h. */
#define _GNU_SOURCE
#include "os/identity.h"

#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

static const char attribute[] = "user.nodedb_mem.identity";

ndm_i_identity ndm_i_identity_fresh(void)
{
    ndm_i_identity fresh = {{0, 0}};
    while (!ndm_i_identity_is_set(fresh))
        if (getrandom(&fresh, sizeof fresh, 0) != sizeof fresh)
            fresh = (ndm_i_identity){{(uint64_t)time(NULL) << 32 ^ (uint64_t)clock(), (uint64_t)getpid()}};
    return fresh;
}

ndm_i_identity ndm_i_identity_of(const ndm_i_file *file)
{
    ndm_i_identity found;
    if (fgetxattr(file->fd, attribute, &found, sizeof found) != (ssize_t)sizeof found)
        return (ndm_i_identity){{0, 0}};
    return found;
}

bool ndm_i_identity_set(const ndm_i_file *file, ndm_i_identity identity)
{
    return fsetxattr(file->fd, attribute, &identity, sizeof identity, 0) == 0;
}

uint64_t ndm_i_identity_stamp(const ndm_i_file *file)
{
    struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}};
    struct stat facts;
    /* UTIME_NOW would be the clock's last tick, which a store just before may have left, too. */
    if (clock_gettime(CLOCK_REALTIME, &times[1]) != 0 || futimens(file->fd, times) != 0 || fstat(file->fd, &facts) != 0)
        return 0;
    return (uint64_t)facts.st_mtim.tv_sec * 1000000000u + (uint64_t)facts.st_mtim.tv_nsec;
}
