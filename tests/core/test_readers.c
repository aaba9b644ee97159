/* One owner at work and readers in other threads: every value carries its checksum, and no reader may ever see another
 * byte. `test_readers [STEPS [SEED]]`; exits 1 at the first thing that is wrong. Half the readers share one ndm_reader,
 * the others have their own. Made for ThreadSanitizer as for AddressSanitizer. */
#define _GNU_SOURCE
#include "check.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

enum { KIB = 1024, MIB = 1024 * 1024, READERS = 4, SLOTS = 40, LARGEST = 200 * KIB };

static char directory[] = "/tmp/nodedb-mem-test-XXXXXX";
static char path[100], slots_path[110], leases_path[110];
static _Atomic int done;

static uint64_t next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* ---- values that know what they are: a checksum of 8 bytes, then pairs of a seed's numbers ------------------- */

static uint64_t sum_of(const uint8_t *bytes, uint64_t size)
{
    uint64_t sum = 14695981039346656037u ^ size, word;
    for (uint64_t i = 8; i < size; i += 8) {
        memcpy(&word, bytes + i, 8);
        sum = (sum ^ word) * 1099511628211u;
    }
    return sum;
}

static void fill(uint8_t *bytes, uint64_t size, uint64_t *chance)
{
    for (uint64_t i = 8; i < size; i += 8) {
        const uint64_t word = next(chance);
        memcpy(bytes + i, &word, 8);
    }
    const uint64_t sum = sum_of(bytes, size);
    memcpy(bytes, &sum, 8);
}

static int is_true(const void *bytes, uint64_t size)
{
    uint64_t sum;
    if (size < 8 || size % 8 != 0)
        return 0;
    memcpy(&sum, bytes, 8);
    return sum == sum_of(bytes, size);
}

/* ---- readers --------------------------------------------------------------------------------------------- */

typedef struct {
    ndm_reader *reader;
    uint64_t chance, copied, borrowed, leased, stale;
} work;

static int is_gone(int64_t status)
{
    if (status == NDM_ERR_WAIT) /* the owner was stopped in the middle of a move */
        return 1;
    return status == NDM_ERR_STALE || status == NDM_ERR_FREED_SLOT || status == NDM_ERR_NO_SLOT;
}

static void *read_on(void *argument)
{
    work *self = argument;
    uint8_t *copy = malloc(LARGEST);
    CHECK(copy);
    while (!atomic_load(&done) || self->copied + self->borrowed + self->leased == 0) {
        const int64_t slot = (int64_t)(next(&self->chance) % SLOTS);
        const uint64_t kind = next(&self->chance) % 8;
        ndm_value value;
        if (kind < 4) {
            const int64_t size = ndm_reader_copy(self->reader, slot, -1, copy, LARGEST);
            CHECK(size >= 0 || is_gone(size));
            CHECK(size < 0 || is_true(copy, (uint64_t)size));
            *(size < 0 ? &self->stale : &self->copied) += 1;
        } else if (kind < 6) { /* as borrow: what was read counts if the value is unchanged afterwards */
            const char *view = ndm_reader_read(self->reader, slot, -1, &value);
            CHECK(view || is_gone(ndm_last_error()->status));
            if (view) {
                const int good = is_true(view, value.size);
                const int unchanged = ndm_reader_is_unchanged(self->reader, &value);
                CHECK(unchanged == 0 || (unchanged == 1 && good));
                *(unchanged ? &self->borrowed : &self->stale) += 1;
                ndm_view_release(view);
            }
        } else {
            const char *view;
            const int64_t lease = ndm_reader_lease(self->reader, slot, -1, &view, &value);
            CHECK(lease >= 0 || is_gone(lease));
            if (lease >= 0) {
                CHECK(is_true(view, value.size));
                if (next(&self->chance) % 4 == 0)
                    usleep(200);
                CHECK(is_true(view, value.size));
                ndm_view_release(view);
                CHECK(ndm_reader_release(self->reader, lease) == NDM_OK);
                self->leased++;
            }
        }
    }
    free(copy);
    return NULL;
}

/* ---- the owner ------------------------------------------------------------------------------------------- */

static int64_t live[SLOTS];
static uint64_t count;

static void write_one(ndm_region *region, uint8_t *bytes, uint64_t *chance)
{
    static const uint64_t sizes[] = {8, 64, 1000, 5000, 40000, 70000, LARGEST};
    const uint64_t size = sizes[next(chance) % (sizeof sizes / sizeof *sizes)];
    fill(bytes, size, chance);
    CHECK((live[count++] = ndm_region_write(region, bytes, size, (int64_t)(next(chance) % 256))) >= 0);
}

static void work_on(ndm_region *region, uint64_t steps, uint64_t seed)
{
    uint8_t *bytes = malloc(LARGEST);
    uint64_t chance = seed;
    ndm_compaction compaction;
    CHECK(bytes);
    for (uint64_t step = 0; step < steps; step++) {
        const uint64_t kind = next(&chance) % 32;
        if (kind == 0) {
            CHECK(ndm_region_compact(region, next(&chance) % 2 ? UINT64_MAX : 300 * KIB, &compaction) == NDM_OK);
        } else if (kind == 1) {
            CHECK(ndm_region_trim(region) >= 0);
        } else if (kind < 16 ? count > SLOTS / 2 : count == SLOTS) {
            const uint64_t which = next(&chance) % count;
            CHECK(ndm_region_free(region, live[which]) >= 0);
            live[which] = live[--count];
        } else {
            write_one(region, bytes, &chance);
        }
        if (step % 256 == 0)
            CHECK(ndm_region_check(region) == 0);
    }
    free(bytes);
}

int main(int argc, char **argv)
{
    const uint64_t steps = argc > 1 ? strtoull(argv[1], NULL, 10) : 4000;
    const uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 88172645463325252u;
    CHECK(mkdtemp(directory));
    snprintf(path, sizeof path, "%s/region", directory);
    snprintf(slots_path, sizeof slots_path, "%s.slots", path);
    snprintf(leases_path, sizeof leases_path, "%s.leases", path);
    const ndm_options options = {
        .initial_capacity = 64 * KIB, .max_capacity = 64 * MIB, .alignment = 64, .cache_limit = UINT64_MAX};
    ndm_region *region = ndm_region_open(path, &options);
    CHECK(region && ndm_region_allow_leases(region) == NDM_OK);

    ndm_reader *shared = ndm_reader_open(path, slots_path, leases_path);
    pthread_t threads[READERS];
    work works[READERS];
    for (int i = 0; i < READERS; i++) {
        works[i] = (work){.reader = shared, .chance = seed + 977 * (uint64_t)(i + 1)};
        if (i >= READERS / 2)
            works[i].reader = ndm_reader_open(path, slots_path, leases_path);
        CHECK(works[i].reader);
        CHECK(pthread_create(&threads[i], NULL, read_on, &works[i]) == 0);
    }
    work_on(region, steps, seed);
    atomic_store(&done, 1);
    work all = {0};
    for (int i = 0; i < READERS; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
        all.copied += works[i].copied;
        all.borrowed += works[i].borrowed;
        all.leased += works[i].leased;
        all.stale += works[i].stale;
        if (works[i].reader != shared)
            ndm_reader_destroy(works[i].reader);
    }
    ndm_reader_destroy(shared);
    ndm_stats stats;
    CHECK(ndm_region_trim(region) >= 0 && ndm_region_check(region) == 0);
    CHECK(ndm_region_stats(region, &stats) == NDM_OK && stats.pinned_bytes == 0);

    /* Taken over: every value is there and true. */
    ndm_region_destroy(region);
    ndm_options again = options;
    again.recover = 1;
    CHECK((region = ndm_region_open(path, &again)) && ndm_region_check(region) == 0);
    uint8_t *bytes = malloc(LARGEST);
    for (uint64_t i = 0; i < count; i++) {
        const int64_t size = ndm_region_read_into(region, live[i], bytes, LARGEST);
        CHECK(size > 0 && is_true(bytes, (uint64_t)size));
    }
    free(bytes);
    ndm_region_destroy(region);
    unlink(path);
    unlink(slots_path);
    unlink(leases_path);
    rmdir(directory);
    printf("readers: %llu copied, %llu borrowed, %llu leased, %llu gone; none wrong\n", (unsigned long long)all.copied,
           (unsigned long long)all.borrowed, (unsigned long long)all.leased, (unsigned long long)all.stale);
    return 0;
}
