/* See waiting.h. */
#define _GNU_SOURCE
#include "waiting.h"

#include <time.h>

enum { PATIENCE = 10 };

bool ndm_i_go_on(ndm_i_wait *wait, ndm_error *refusal, int status)
{
    struct timespec now = {0};
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (PyErr_CheckSignals() != 0)
        return false;
    if (wait->began == 0)
        wait->began = (int64_t)now.tv_sec;
    if ((int64_t)now.tv_sec - wait->began <= PATIENCE)
        return true;
    refusal->status = status;
    return false;
}
