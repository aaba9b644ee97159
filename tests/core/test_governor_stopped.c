/* A process that is stopped, and so neither goes on nor dies: with the lock on a shared governor's file; in the line. */
#define _GNU_SOURCE
#include "check.h"
#include "governor/lock.h"
#include "governor/rows.h"
#include "os/patience.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MIB = 1 << 20 };

static char directory[] = "/dev/shm/test-stopped-XXXXXX", path[128]; /* no busy disk stops this process itself */

static ndm_governor *open_shared(void)
{
    const ndm_governor_options options = {
        .ceiling = 64 * MIB, .warning = 70, .critical = 85, .emergency = 95, .hysteresis = 5};
    ndm_governor *governor = ndm_governor_open(path, &options);
    CHECK(governor && ndm_governor_add_engine(governor, 0, 32 * MIB, 1) == NDM_OK);
    CHECK(ndm_governor_add_engine(governor, 1, 16 * MIB, 1) == NDM_OK);
    return governor;
}

/* A child that stops with the lock. */
static pid_t stopped_inside(ndm_governor *governor)
{
    int status;
    const pid_t child = fork();
    if (child == 0) {
        CHECK(ndm_i_books_lock(governor) == NDM_OK);
        raise(SIGSTOP);
        ndm_i_books_unlock(governor);
        _exit(0);
    }
    CHECK(child > 0 && waitpid(child, &status, WUNTRACED) == child && WIFSTOPPED(status));
    return child;
}

static bool timed_out(int64_t status)
{
    return status == NDM_ERR_IO && ndm_last_error()->status == NDM_ERR_IO && ndm_last_error()->os_errno == ETIMEDOUT;
}

static void *refused_too(void *governor)
{
    CHECK(timed_out(ndm_governor_reserve(governor, 0, 20 * MIB)));
    return NULL;
}

static void with_the_lock(int end)
{
    static ndm_governor_figures figures;
    ndm_governor *governor = open_shared();
    governor->patience = 50000000; /* 50 ms */
    CHECK(ndm_governor_reserve(governor, 0, 30 * MIB) == NDM_OK);
    const int64_t ticket = ndm_governor_queue(governor, 0, 5 * MIB);
    CHECK(ticket > 0);
    const pid_t child = stopped_inside(governor);

    /* Refused, in all threads, after some time. */
    CHECK(timed_out(ndm_governor_reserve(governor, 0, 20 * MIB)) && timed_out(ndm_governor_charge(governor, 0, 1)));
    CHECK(timed_out(ndm_governor_wait(governor, ticket, 0)) && timed_out(ndm_governor_queue(governor, 0, 1)));
    CHECK(timed_out(ndm_governor_snapshot(governor, &figures)) && timed_out(ndm_governor_set_limit(governor, 0, MIB)));
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, refused_too, governor) == 0);
    refused_too(governor);
    pthread_join(thread, NULL);
    /* What needs no answer goes on. */
    ndm_governor_leave(governor, ticket);
    CHECK(ndm_governor_release(governor, 0, 10 * MIB) == NDM_OK && ndm_governor_allocated(governor, 0) == 20 * MIB);
    CHECK(ndm_governor_release(governor, 0, 30 * MIB) != NDM_OK && ndm_governor_allocated(governor, 0) == 20 * MIB);

    kill(child, end);
    waitpid(child, NULL, 0);
    CHECK(ndm_governor_snapshot(governor, &figures) == NDM_OK && ndm_governor_check(governor) == 0);
    CHECK(figures.allocated == 20 * MIB && figures.waiting == 0 && figures.repairs == (end == SIGKILL));
    CHECK(ndm_governor_reserve(governor, 0, 12 * MIB) == NDM_OK && ndm_governor_reserve(governor, 0, 1) == NDM_ERR_BUDGET);
    ndm_governor_destroy(governor);
    unlink(path);
}

/* Who waits and does not look for long holds nobody up, and keeps its place. */
static void in_the_line(void)
{
    ndm_governor *governor = open_shared();
    CHECK(ndm_governor_reserve(governor, 0, 30 * MIB) == NDM_OK);
    const int64_t first = ndm_governor_queue(governor, 0, 20 * MIB), second = ndm_governor_queue(governor, 0, MIB);
    CHECK(ndm_governor_wait(governor, second, 0) == NDM_ERR_BUDGET);
    CHECK(ndm_governor_wait(governor, first, 0) == NDM_ERR_BUDGET);
    ndm_i_waiter *waiter = &governor->books->waiters[0];
    CHECK(waiter->ticket == (uint64_t)first && waiter->looked <= ndm_i_now());
    waiter->looked = ndm_i_now() - UINT64_C(5100000000); /* it is stopped, and time goes by */
    CHECK(ndm_governor_wait(governor, second, 0) == NDM_OK && ndm_governor_reserve(governor, 0, 1) == NDM_OK);
    CHECK(ndm_governor_wait(governor, first, 0) == NDM_ERR_BUDGET); /* it looks again */
    CHECK(ndm_governor_reserve(governor, 0, 1) == NDM_ERR_BUDGET);
    CHECK(ndm_governor_release(governor, 0, 20 * MIB) == NDM_OK && ndm_governor_wait(governor, first, 0) == NDM_OK);
    CHECK(ndm_governor_check(governor) == 0);
    ndm_governor_destroy(governor);
    unlink(path);
}

int main(void)
{
    CHECK(mkdtemp(directory));
    snprintf(path, sizeof path, "%s/governor", directory);
    with_the_lock(SIGCONT);
    with_the_lock(SIGKILL);
    in_the_line();
    rmdir(directory);
    return 0;
}
