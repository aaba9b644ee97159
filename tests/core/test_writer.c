/* Several owners and the background writers of their regions, hammered at once, every byte verified.
 *
 * Each owner thread drives a region of its own at random: write, free, read, evict, flush, compact, trim, raise the ceiling.
 * The cache limit is the smallest, so the background writer always has work. Views travel to other threads, which verify
 * and release them while the owner goes on; many outlive their slot, some their region, and regions are given up on a
 * thread that never owned them. Run it under ThreadSanitizer (make tsan) and AddressSanitizer (make test-native).
 *
 * usage: test_writer [directory [steps [seed]]]: the directory should be on a disk, for on tmpfs no writer runs. */
#define _GNU_SOURCE
#include "emulated.h"
#include "nodedb_mem.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OWNERS = 3, RELEASERS = 2, MOST_VALUES = 300, MOST_QUEUED = 64, KIB = 1024 };

#define MOST_SIZE ((uint64_t)3 << 20)
#define MOST_LIVE ((uint64_t)24 << 20) /* bytes of a region, six times its limit */

#define CHECK(condition)                                                                     \
    do {                                                                                     \
        if (!(condition)) {                                                                  \
            fprintf(stderr, "%s:%d: %s (%s)\n", __FILE__, __LINE__, #condition, last_error()); \
            abort();                                                                         \
        }                                                                                    \
    } while (0)

static const char *directory = ".";
static unsigned long steps = 1500, seed = 1;

static const char *last_error(void)
{
    const ndm_error *error = ndm_last_error();
    return error->message ? error->message : "no error";
}

static uint64_t next_random(uint64_t *state)
{
    *state += 0x9E3779B97F4A7C15u;
    uint64_t x = *state;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

static uint64_t below(uint64_t *state, uint64_t limit) { return next_random(state) % limit; }

/* ---- values: told from their number alone --------------------------------------------------------------- */

static void fill(uint8_t *buffer, uint64_t size, uint64_t number)
{
    const uint64_t start = number * 0x9E3779B97F4A7C15u;
    for (uint64_t i = 0; i < size; i += 8) {
        const uint64_t word = start + i;
        memcpy(buffer + i, &word, size - i < 8 ? size - i : 8);
    }
}

static bool holds(const char *view, uint64_t size, uint64_t number)
{
    const uint64_t start = number * 0x9E3779B97F4A7C15u;
    for (uint64_t i = 0; i < size; i += 8) {
        const uint64_t word = start + i;
        if (memcmp(view + i, &word, size - i < 8 ? size - i : 8) != 0)
            return false;
    }
    return true;
}

static uint64_t some_size(uint64_t *random)
{
    static const uint64_t edges[] = {1, 64, 4096, 64 * KIB, 256 * KIB, 512 * KIB, 1024 * KIB};
    switch (below(random, 8)) {
    case 0:
        return below(random, MOST_SIZE) + 1;
    case 1:
    case 2:
        return edges[below(random, sizeof edges / sizeof *edges)] + below(random, 3) - (below(random, 3) == 0);
    case 3:
        return below(random, 300 * KIB);
    default:
        return below(random, 20 * KIB);
    }
}

/* ---- views on other threads ------------------------------------------------------------------------------ */

typedef struct {
    const char *view; /* NULL: give up the region instead */
    ndm_region *region;
    uint64_t size, number;
} parcel;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t filled = PTHREAD_COND_INITIALIZER, drained = PTHREAD_COND_INITIALIZER;
static parcel queue[MOST_QUEUED];
static unsigned queued;
static bool finished;

static void send(parcel item)
{
    pthread_mutex_lock(&lock);
    while (queued == MOST_QUEUED)
        pthread_cond_wait(&drained, &lock);
    queue[queued++] = item;
    pthread_cond_signal(&filled);
    pthread_mutex_unlock(&lock);
}

static void *release(void *argument)
{
    uint64_t random = seed * 7919 + (uint64_t)(uintptr_t)argument;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (queued == 0 && !finished)
            pthread_cond_wait(&filled, &lock);
        if (queued == 0)
            break;
        const uint64_t pick = below(&random, queued); /* in any order */
        const parcel item = queue[pick];
        queue[pick] = queue[--queued];
        pthread_cond_signal(&drained);
        pthread_mutex_unlock(&lock);
        if (item.view) {
            CHECK(holds(item.view, item.size, item.number));
            ndm_view_release(item.view);
        } else {
            ndm_region_destroy(item.region);
        }
        pthread_mutex_lock(&lock);
    }
    pthread_mutex_unlock(&lock);
    return NULL;
}

/* ---- an owner ------------------------------------------------------------------------------------------- */

typedef struct {
    ndm_region *region;
    uint64_t random, live, written, written_back, number;
    unsigned count;
    uint8_t *buffer;
    struct {
        int64_t slot;
        uint64_t size, number;
    } values[MOST_VALUES];
} owner;

static void free_one(owner *self, unsigned which)
{
    CHECK(ndm_region_free(self->region, self->values[which].slot) == NDM_OK);
    self->live -= self->values[which].size;
    self->values[which] = self->values[--self->count];
}

static void write_one(owner *self)
{
    const uint64_t size = some_size(&self->random), number = ++self->number;
    while (self->count > 0 && (self->count == MOST_VALUES || self->live + size > MOST_LIVE))
        free_one(self, (unsigned)below(&self->random, self->count));
    fill(self->buffer, size, number);
    const int64_t slot = ndm_region_write(self->region, self->buffer, size, (int64_t)(number % 4));
    if (slot == NDM_ERR_CAPACITY) { /* holes, and views that hold space */
        ndm_info info;
        CHECK(ndm_region_info(self->region, &info) == NDM_OK);
        CHECK(ndm_region_set_max_capacity(self->region, info.max_capacity * 2) == NDM_OK);
        return;
    }
    if (slot == NDM_ERR_IO && ndm_last_error()->os_errno == ENOMEM && !can_double_mappings())
        return; /* past the reserved address space, while a view lives */
    CHECK(slot >= 0);
    self->values[self->count].slot = slot;
    self->values[self->count].size = size;
    self->values[self->count++].number = number;
    self->live += size;
    self->written += size;
}

static void read_one(owner *self, unsigned which, bool elsewhere)
{
    uint64_t size;
    const uint64_t number = self->values[which].number;
    const char *view = ndm_region_read(self->region, self->values[which].slot, &size);
    CHECK(view && size == self->values[which].size);
    if (elsewhere && size > 0) {
        send((parcel){.view = view, .size = size, .number = number});
        return;
    }
    CHECK(holds(view, size, number));
    ndm_view_release(view);
}

static void copy_one(owner *self, unsigned which)
{
    const uint64_t size = self->values[which].size;
    CHECK(ndm_region_read_into(self->region, self->values[which].slot, self->buffer, MOST_SIZE) == (int64_t)size);
    CHECK(holds((const char *)self->buffer, size, self->values[which].number));
}

static void evict_some(owner *self)
{
    int64_t slots[16];
    const uint64_t count = below(&self->random, 16) + 1;
    for (uint64_t i = 0; i < count; i++)
        slots[i] = self->values[below(&self->random, self->count)].slot;
    CHECK(ndm_region_evict(self->region, slots, count) == NDM_OK);
}

static void do_something(owner *self)
{
    ndm_compaction compaction;
    ndm_stats stats;
    const uint64_t choice = below(&self->random, 100);
    const unsigned which = self->count > 0 ? (unsigned)below(&self->random, self->count) : 0;
    if (self->count == 0 || choice < 45)
        write_one(self);
    else if (choice < 60)
        free_one(self, which);
    else if (choice < 70)
        read_one(self, which, false);
    else if (choice < 85)
        read_one(self, which, true);
    else if (choice < 90)
        copy_one(self, which);
    else if (choice < 93)
        evict_some(self);
    else if (choice < 94)
        CHECK(ndm_region_evict(self->region, NULL, 0) == NDM_OK);
    else if (choice < 95)
        CHECK(ndm_region_flush(self->region) == NDM_OK);
    else if (choice < 97)
        CHECK(ndm_region_compact(self->region, below(&self->random, 4 << 20) + 1, &compaction) == NDM_OK);
    else if (choice < 98)
        CHECK(ndm_region_trim(self->region) >= 0);
    else if (choice < 99)
        CHECK(ndm_region_stats(self->region, &stats) == NDM_OK && stats.live_bytes == self->live);
    else
        CHECK(ndm_region_check(self->region) == 0);
}

static void *own(void *argument)
{
    const uint64_t me = (uint64_t)(uintptr_t)argument;
    owner *self = calloc(1, sizeof *self);
    CHECK(self && (self->buffer = malloc(MOST_SIZE + 8)));
    self->random = seed * 104729 + me;
    for (unsigned round = 0; round < 3; round++) {
        /* The first has address space for all it needs, the others soon leave their reservation. */
        const ndm_options options = {.initial_capacity = (1 << 20) + round * 12345,
                                     .max_capacity = round == 0 ? (uint64_t)1 << 30 : (uint64_t)2 << 20,
                                     .alignment = round == 2 ? 1 : 64,
                                     .cache_limit = 0};
        self->region = ndm_region_open_temporary(directory, &options);
        CHECK(self->region);
        self->count = 0;
        self->live = 0;
        for (unsigned long step = 0; step < steps / 3; step++)
            do_something(self);
        for (unsigned which = 0; which < self->count; which++)
            read_one(self, which, which % 4 == 0);
        CHECK(ndm_region_check(self->region) == 0);
        ndm_stats stats;
        CHECK(ndm_region_stats(self->region, &stats) == NDM_OK);
        self->written_back += stats.written_back_bytes;
        if (round == 1) { /* as a garbage collector may: open, and on another thread */
            send((parcel){.region = self->region});
            continue;
        }
        CHECK(ndm_region_close(self->region) == NDM_OK);
        ndm_region_destroy(self->region);
    }
    printf("  owner %" PRIu64 ": %" PRIu64 " values, %" PRIu64 " MiB, %" PRIu64 " MiB by the background writer\n", me,
           self->number, self->written >> 20, self->written_back >> 20);
    free(self->buffer);
    free(self);
    return NULL;
}

int main(int count, char **arguments)
{
    if (count > 1)
        directory = arguments[1];
    if (count > 2)
        steps = strtoul(arguments[2], NULL, 10);
    if (count > 3)
        seed = strtoul(arguments[3], NULL, 10);
    pthread_t owners[OWNERS], releasers[RELEASERS];
    for (uintptr_t i = 0; i < RELEASERS; i++)
        CHECK(pthread_create(&releasers[i], NULL, release, (void *)i) == 0);
    for (uintptr_t i = 0; i < OWNERS; i++)
        CHECK(pthread_create(&owners[i], NULL, own, (void *)i) == 0);
    for (unsigned i = 0; i < OWNERS; i++)
        CHECK(pthread_join(owners[i], NULL) == 0);
    pthread_mutex_lock(&lock);
    finished = true;
    pthread_cond_broadcast(&filled);
    pthread_mutex_unlock(&lock);
    for (unsigned i = 0; i < RELEASERS; i++)
        CHECK(pthread_join(releasers[i], NULL) == 0);
    puts("  ok");
    return 0;
}
