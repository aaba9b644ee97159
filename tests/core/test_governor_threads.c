/* Threads that reserve, release, charge, wait and look on one governor, and change its limits: for ThreadSanitizer, and for
 * the invariant, which a thread samples meanwhile. test_governor_threads [steps] [PATH]: with a path, shared by two opens. */
#define _GNU_SOURCE
#include "check.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

enum { THREADS = 8, ENGINES = 3, KIB = 1 << 10, HELD = 8 };

static const uint64_t ceiling = 512 * KIB, limits[ENGINES] = {256 * KIB, 128 * KIB, 128 * KIB};
static _Atomic int done;
static uint64_t steps = 20000;

typedef struct {
    ndm_governor *governor;
    uint64_t chance, granted, refused, waited;
} worker;

static uint64_t next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static int reserve(worker *self, int64_t engine, uint64_t size)
{
    if (next(&self->chance) % 64 != 0)
        return ndm_governor_reserve(self->governor, engine, size);
    const int64_t ticket = ndm_governor_queue(self->governor, engine, size);
    CHECK(ticket > 0);
    const int status = ndm_governor_wait(self->governor, ticket, 2000000);
    if (status != NDM_OK)
        ndm_governor_leave(self->governor, ticket);
    self->waited += status == NDM_OK;
    return status;
}

static void *work(void *argument)
{
    worker *self = argument;
    uint64_t held[HELD] = {0};
    int64_t engines[HELD] = {0};
    for (uint64_t step = 0; step < steps; step++) {
        const uint64_t at = next(&self->chance) % HELD;
        if (held[at] > 0) {
            CHECK(ndm_governor_release(self->governor, engines[at], held[at]) == NDM_OK);
            held[at] = 0;
            continue;
        }
        const int64_t engine = (int64_t)(next(&self->chance) % ENGINES);
        const uint64_t size = 1 + next(&self->chance) % (next(&self->chance) % 8 ? 4 * KIB : 64 * KIB);
        const int status = reserve(self, engine, size);
        CHECK(status == NDM_OK || status == NDM_ERR_BUDGET || status == NDM_ERR_CEILING || status == NDM_ERR_WAIT);
        self->granted += status == NDM_OK;
        self->refused += status != NDM_OK;
        if (status == NDM_OK) {
            held[at] = size;
            engines[at] = engine;
        }
    }
    for (int i = 0; i < HELD; i++)
        if (held[i] > 0)
            CHECK(ndm_governor_release(self->governor, engines[i], held[i]) == NDM_OK);
    return NULL;
}

static void *sample(void *argument)
{
    static ndm_governor_figures figures;
    uint64_t samples = 0;
    while (!atomic_load(&done) || samples == 0) {
        CHECK(ndm_governor_check(argument) == 0);
        CHECK(ndm_governor_snapshot(argument, &figures) == NDM_OK);
        CHECK(figures.allocated <= ceiling && figures.granted <= ceiling && figures.peak <= ceiling);
        for (int engine = 0; engine < ENGINES; engine++)
            CHECK(figures.engines[engine].allocated <= limits[engine] && figures.engines[engine].peak <= limits[engine]);
        CHECK(ndm_governor_pressure(argument, -1) >= 0);
        samples++;
        usleep(100);
    }
    return NULL;
}

static ndm_governor *start(const char *path)
{
    const ndm_governor_options options = {
        .ceiling = ceiling, .warning = 70, .critical = 85, .emergency = 95, .hysteresis = 5};
    ndm_governor *governor = path ? ndm_governor_open(path, &options) : ndm_governor_create(&options);
    CHECK(governor);
    for (int engine = 0; engine < ENGINES; engine++)
        CHECK(ndm_governor_add_engine(governor, engine, limits[engine], 1) == NDM_OK);
    return governor;
}

static void run(const char *path)
{
    pthread_t threads[THREADS], sampler;
    worker workers[THREADS];
    ndm_governor *governors[2] = {start(path), NULL};
    governors[1] = path ? start(path) : governors[0];
    uint64_t granted = 0, refused = 0;
    atomic_store(&done, 0);
    CHECK(pthread_create(&sampler, NULL, sample, governors[0]) == 0);
    for (int i = 0; i < THREADS; i++) {
        workers[i] = (worker){.governor = governors[i % 2], .chance = 88172645463325252u + (uint64_t)i};
        CHECK(pthread_create(&threads[i], NULL, work, &workers[i]) == 0);
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        granted += workers[i].granted;
        refused += workers[i].refused;
    }
    atomic_store(&done, 1);
    pthread_join(sampler, NULL);
    CHECK(granted > 0 && refused > 0);
    CHECK(ndm_governor_allocated(governors[0], -1) == 0 && ndm_governor_check(governors[0]) == 0);
    if (path)
        ndm_governor_destroy(governors[1]);
    ndm_governor_destroy(governors[0]);
}

int main(int argc, char **argv)
{
    char directory[] = "/tmp/test-governor-threads-XXXXXX", path[128];
    if (argc > 1)
        steps = strtoull(argv[1], NULL, 10);
    CHECK(mkdtemp(directory));
    snprintf(path, sizeof path, "%s/governor", directory);
    run(NULL);
#ifndef __SANITIZE_THREAD__ /* which does not see what a lock on a file orders */
    run(path);
#endif
    unlink(path);
    rmdir(directory);
    return 0;
}
