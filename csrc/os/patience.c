/* See patience.h. */
#define _GNU_SOURCE
#include "os/patience.h"

#include "os/bits.h"

#include <time.h>

/* A small value is moved in less than the first pause. A signal handler of Python waits no longer than a person notices. */
#define FIRST_PAUSE ((uint64_t)50000)
#define LONGEST_PAUSE ((uint64_t)2000000)
#define ENOUGH ((uint64_t)20000000)

uint64_t ndm_i_now(void)
{
    struct timespec time = {0};
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

bool ndm_i_pause(ndm_i_patience *patience)
{
    const uint64_t moment = ndm_i_now();
    if (patience->pause == 0)
        patience->began = moment;
    else if (moment - patience->began >= ENOUGH)
        return false;
    patience->pause = patience->pause == 0 ? FIRST_PAUSE : ndm_i_min(patience->pause * 2, LONGEST_PAUSE);
    nanosleep(&(struct timespec){.tv_nsec = (long)patience->pause}, NULL);
    return true;
}
