/* A process dies at each instruction of what it does with a shared governor. It is traced, step by step; whenever a step has
 * changed the file, a copy is kept. Afterwards each of these states is put in place, with a living process
 * beside the dead one: nothing contradicts itself, what the dead one held is given back, and the file can be opened. */
#define _GNU_SOURCE
#include "check.h"
#include "governor/lock.h"
#include "os/bits.h"

#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MIB = 1 << 20, ROWS = 3, MOST = 4000, MINE = 3 * MIB };

static char directory[] = "/dev/shm/test-deaths-XXXXXX", path[128]; /* no busy disk stops this process itself */
static char *file;          /* its bytes, mapped */
static size_t part;         /* of it: the books, and the rows that are used */
static char *states[MOST];  /* of that part, one after the other */
static int count;
static ndm_governor *living, *dying;
static ndm_governor_figures figures;

static const ndm_governor_options plain = {
    .ceiling = 64 * MIB, .warning = 70, .critical = 85, .emergency = 95, .hysteresis = 5};

static ndm_governor *opened(void)
{
    ndm_governor *governor = ndm_governor_open(path, &(ndm_governor_options){
        .ceiling = 64 * MIB, .warning = 70, .critical = 85, .emergency = 95, .hysteresis = 5, .adopt = 1});
    CHECK(governor);
    return governor;
}

static void begin(void)
{
    unlink(path);
    CHECK((living = ndm_governor_open(path, &plain)));
    CHECK(ndm_governor_add_engine(living, 0, 32 * MIB, 1) == NDM_OK);
    CHECK(ndm_governor_add_engine(living, 1, 16 * MIB, 0) == NDM_OK);
    CHECK(ndm_governor_reserve(living, 0, MINE) == NDM_OK);
    const size_t rows_at = ndm_i_round_up(sizeof(ndm_i_books), 4096);
    part = rows_at + ROWS * sizeof(ndm_i_row);
    const int fd = open(path, O_RDWR);
    CHECK(fd >= 0 && (file = mmap(NULL, part, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)) != MAP_FAILED);
    close(fd);
}

static void end(void)
{
    while (count > 0)
        free(states[--count]);
    munmap(file, part);
    ndm_governor_destroy(living);
}

static bool differs(const char *state, size_t offset, size_t size)
{
    return memcmp(state + offset, file + offset, size) != 0;
}

/* Is it what was kept last? Only what is ever used of it is compared, for each step is. */
static bool is_known(void)
{
    if (count == 0)
        return false;
    const char *last = states[count - 1];
    const size_t rows_at = part - ROWS * sizeof(ndm_i_row);
    bool changed = differs(last, 0, offsetof(ndm_i_books, engine[8])) ||
                   differs(last, offsetof(ndm_i_books, waiters), 4 * sizeof(ndm_i_waiter));
    for (size_t i = 0; i < ROWS && !changed; i++)
        changed = differs(last, rows_at + i * sizeof(ndm_i_row), offsetof(ndm_i_row, cells[8]));
    return !changed;
}

static void keep_state(void)
{
    if (is_known())
        return;
    CHECK(count < MOST && (states[count] = malloc(part)));
    memcpy(states[count++], file, part);
}

static void look_at(const char *state)
{
    memcpy(file, state, part);
    ndm_governor *late = opened(); /* finds it as it is */
    CHECK(ndm_governor_check(living) == 0);
    CHECK(ndm_governor_snapshot(living, &figures) == NDM_OK);
    CHECK(figures.process_count == 2 && figures.allocated == MINE && figures.waiting == 0);
    CHECK(figures.engines[0].limit >= 10 * MIB && figures.engines[0].limit <= 32 * MIB);
    /* All can be had, and no more. */
    CHECK(ndm_governor_set_ceiling(living, 64 * MIB, 0) == NDM_OK);
    CHECK(ndm_governor_reserve(late, 0, figures.engines[0].limit - MINE) == NDM_OK);
    CHECK(ndm_governor_reserve(late, 0, 1) == NDM_ERR_BUDGET && ndm_governor_check(late) == 0);
    ndm_governor_destroy(late);
    CHECK(ndm_governor_check(living) == 0);
}

/* false: nobody can be traced here. */
static bool step_through(void (*prepare)(void), void (*work)(void))
{
    int status;
    const pid_t child = fork();
    if (child == 0) {
        dying = opened();
        prepare();
        if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) != 0)
            _exit(2);
        raise(SIGSTOP);
        work();
        raise(SIGKILL);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    if (!WIFSTOPPED(status)) {
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 2);
        return false;
    }
    while (WIFSTOPPED(status)) {
        keep_state();
        if (ptrace(PTRACE_SINGLESTEP, child, NULL, NULL) != 0 || waitpid(child, &status, 0) != child)
            break;
    }
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    return true;
}

static void dies_in(void (*prepare)(void), void (*work)(void), int least)
{
    begin();
    if (!step_through(prepare, work)) {
        fprintf(stderr, "skipped: deaths at each instruction (no tracing here)\n");
    } else {
        CHECK(count > least);
        for (int i = 0; i < count; i++)
            look_at(states[i]);
    }
    end();
}

static void nothing(void) {}

static void hold(void) { CHECK(ndm_governor_reserve(dying, 0, 2 * MIB) == NDM_OK); }

static void reserve_all(void)
{
    CHECK(ndm_governor_reserve(dying, 0, 29 * MIB) == NDM_OK); /* sweeps the other's slack */
}

static void release(void) { CHECK(ndm_governor_release(dying, 0, 2 * MIB) == NDM_OK); }

static void charge_too_much(void) { CHECK(ndm_governor_charge(dying, 1, 70 * MIB) == NDM_OK); }

static void wait_and_leave(void)
{
    const int64_t ticket = ndm_governor_queue(dying, 0, 31 * MIB);
    CHECK(ticket > 0);
    ndm_governor_leave(dying, ticket);
}

static void change_limits(void)
{
    CHECK(ndm_governor_add_engine(dying, 7, 5 * MIB, 1) == NDM_OK);
    CHECK(ndm_governor_set_limit(dying, 0, 10 * MIB) == NDM_OK);
    CHECK(ndm_governor_set_ceiling(dying, 2 * MIB, MIB) == NDM_OK); /* below what is reserved */
}

static void leave(void) { ndm_governor_destroy(dying); }

/* Another one has died before, and what it held is given back by the one that dies now. */
static void find_a_dead_one(void)
{
    const pid_t other = fork();
    if (other == 0) {
        ndm_governor *governor = opened();
        CHECK(ndm_governor_reserve(governor, 0, 5 * MIB) == NDM_OK && ndm_governor_queue(governor, 0, 30 * MIB) > 0);
        raise(SIGKILL);
    }
    waitpid(other, NULL, 0);
}

static void reap(void)
{
    static ndm_governor_figures seen;
    CHECK(ndm_governor_snapshot(dying, &seen) == NDM_OK && seen.allocated == MINE);
}

int main(void)
{
    CHECK(mkdtemp(directory));
    snprintf(path, sizeof path, "%s/governor", directory);
    dies_in(nothing, reserve_all, 20);
    dies_in(hold, release, 5);
    dies_in(nothing, charge_too_much, 10);
    dies_in(hold, wait_and_leave, 15);
    dies_in(hold, change_limits, 15);
    dies_in(hold, leave, 5);
    dies_in(find_a_dead_one, reap, 10);
    unlink(path);
    rmdir(directory);
    return 0;
}
