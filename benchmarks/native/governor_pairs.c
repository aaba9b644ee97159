/* What a pair of reserve and release costs from C. Prints a line for each case: its name, and nanoseconds of processor time a
 * pair. What the processor waits for a cache line that another has counts; what it does for other programs does not.
 *
 *     governor_pairs PATH [pairs]       PATH: where the shared governor's file may be */
#define _GNU_SOURCE
#include "nodedb_mem.h"

#include "timing.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MIB = 1 << 20, ROUNDS = 7 };

static const ndm_governor_options options = {
    .ceiling = 1024ull * MIB, .warning = 70, .critical = 85, .emergency = 95, .hysteresis = 5};

static uint64_t pairs_to_do = 2000000;

static double spent(void) /* ns */
{
    struct timespec at;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &at);
    return (double)at.tv_sec * 1e9 + (double)at.tv_nsec;
}

static double pair_ns(ndm_governor *governor, int64_t engine, uint64_t size)
{
    const double start = spent();
    for (uint64_t i = 0; i < pairs_to_do; i++)
        if (ndm_governor_reserve(governor, engine, size) != NDM_OK ||
            ndm_governor_release(governor, engine, size) != NDM_OK)
            exit(1);
    return (spent() - start) / (double)pairs_to_do;
}

static int by_size(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *figures)
{
    qsort(figures, ROUNDS, sizeof *figures, by_size);
    return figures[ROUNDS / 2];
}

static void print_alone(const char *name, ndm_governor *governor, uint64_t size)
{
    double figures[ROUNDS];
    for (int i = 0; i < ROUNDS; i++)
        figures[i] = pair_ns(governor, 0, size);
    printf("%s %.1f\n", name, median(figures));
    fflush(stdout);
}

/* `engines` 1: both processes reserve for the same engine. */
static void print_two(const char *name, const char *path, uint64_t size, int engines)
{
    double figures[ROUNDS];
    for (int i = 0; i < ROUNDS; i++) {
        int ready[2];
        double slower = 0, other;
        if (pipe(ready) != 0)
            exit(1);
        const pid_t child = fork();
        ndm_governor *governor = ndm_governor_open(path, &options);
        if (!governor)
            exit(1);
        pair_ns(governor, child == 0 ? 0 : engines - 1, size); /* both are there by the time of the measurement */
        const double mine = pair_ns(governor, child == 0 ? 0 : engines - 1, size);
        if (child == 0) {
            _exit(write(ready[1], &mine, sizeof mine) != sizeof mine);
        }
        pair_ns(governor, engines - 1, size);
        if (read(ready[0], &other, sizeof other) != sizeof other)
            exit(1);
        waitpid(child, NULL, 0);
        slower = mine > other ? mine : other;
        figures[i] = slower;
        close(ready[0]);
        close(ready[1]);
        ndm_governor_destroy(governor);
    }
    printf("%s %.1f\n", name, median(figures));
    fflush(stdout);
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return 2;
    if (argc > 2)
        pairs_to_do = strtoull(argv[2], NULL, 10);
    ndm_governor *own = ndm_governor_create(&options), *shared = ndm_governor_open(argv[1], &options);
    if (!own || !shared)
        return 1;
    for (int engine = 0; engine < 2; engine++)
        if (ndm_governor_add_engine(own, engine, 256 * MIB, 1) != NDM_OK ||
            ndm_governor_add_engine(shared, engine, 256 * MIB, 1) != NDM_OK)
            return 1;
    print_alone("private", own, 4096);
    print_alone("private-1MiB", own, MIB);
    print_alone("shared", shared, 4096);
    print_two("two-processes-one-engine", argv[1], 4096, 1);
    print_two("two-processes-two-engines", argv[1], 4096, 2);
    ndm_governor_destroy(own);
    ndm_governor_destroy(shared);
    unlink(argv[1]);
    return 0;
}
