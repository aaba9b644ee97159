/* See futex.h. */
#define _GNU_SOURCE
#include "os/futex.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SECOND UINT64_C(1000000000)

bool ndm_i_futex_wait(const _Atomic uint32_t *word, uint32_t seen, uint64_t nanoseconds)
{
    const struct timespec span = {.tv_sec = (time_t)(nanoseconds / SECOND), .tv_nsec = (long)(nanoseconds % SECOND)};
    return syscall(SYS_futex, word, FUTEX_WAIT, seen, &span, NULL, 0) == 0 || errno != EINTR;
}

void ndm_i_futex_wake(const _Atomic uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0); }
