/* Threads that own nothing here call every verb of a region, by pointer and by handle, while its owner opens, works and
 * closes, over and over. Each of their calls has to be refused: NDM_ERR_WRONG_THREAD, or NDM_ERR_CLOSED once the region is
 * closed. The owner's calls have to go on as if nobody else were there.
 *
 *   make stress SECONDS=60
 *
 * Some of the threads have never opened a region, some own one of their own, and some live for a few calls only. */
#include "check.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

enum { STRANGERS = 2, NEIGHBOURS = 2, BATCH = 32, VALUES = 8 };

/* What stands for a region: the struct stays until all have let it go. */
static _Atomic(ndm_region *) shared;
static _Atomic uint64_t shared_handle;
static _Atomic int stop;
static _Atomic uint64_t rounds[STRANGERS + NEIGHBOURS + 1]; /* of each foreign thread: it holds no pointer in between */
static _Atomic uint64_t calls;

static ndm_region *open_region(void)
{
    const ndm_options options = {
        .initial_capacity = 1 << 16, .max_capacity = 1 << 22, .alignment = 64, .cache_limit = UINT64_MAX};
    ndm_region *region = ndm_region_open_temporary("/var/tmp", &options);
    CHECK(region);
    return region;
}

/* ---- the verbs, each called so that its owner would succeed, or harm itself ----------------------------- */

static const char text[] = "foreign bytes, which must never be stored";
static const int64_t length = sizeof text, first_slot = 0;

static int64_t or_error(const void *pointer) { return pointer ? 0 : ndm_last_error()->status; }

static int64_t do_write(ndm_region *region) { return ndm_region_write(region, text, sizeof text, 0); }

static int64_t do_write_vectored(ndm_region *region)
{
    const void *parts[] = {text, text};
    const uint64_t sizes[] = {sizeof text, sizeof text};
    return ndm_region_write_vectored(region, parts, sizes, 2, 1, 0);
}

static int64_t do_write_many(ndm_region *region)
{
    const void *part = text;
    const uint64_t size = sizeof text;
    int64_t slot;
    return ndm_region_write_many(region, &part, &size, 1, 0, &slot);
}

static int64_t do_write_packed(ndm_region *region)
{
    int64_t slot;
    return ndm_region_write_packed(region, text, sizeof text, &length, 1, 0, &slot);
}

static int64_t do_allocate(ndm_region *region)
{
    char *view;
    return ndm_region_allocate(region, 100, 0, &view);
}

static int64_t do_commit(ndm_region *region) { return ndm_region_commit(region, 0); }

static int64_t do_read(ndm_region *region)
{
    uint64_t size;
    return or_error(ndm_region_read(region, 0, &size));
}

static int64_t do_try_read(ndm_region *region)
{
    const char *view;
    uint64_t size;
    return ndm_region_try_read(region, 0, &view, &size);
}

static int64_t do_restore(ndm_region *region)
{
    uint64_t size;
    return or_error(ndm_region_restore(region, 0, &size));
}

static int64_t do_read_into(ndm_region *region)
{
    char buffer[64];
    return ndm_region_read_into(region, 0, buffer, sizeof buffer);
}

static int64_t do_read_many(ndm_region *region)
{
    const char *view;
    uint64_t size;
    return ndm_region_read_many(region, &first_slot, 1, &view, &size);
}

static int64_t do_load_many(ndm_region *region)
{
    char buffer[64];
    int64_t size;
    return ndm_region_load_many(region, &first_slot, 1, buffer, sizeof buffer, &size);
}

static int64_t do_pin(ndm_region *region) { return or_error(ndm_region_pin(region, 0, NULL)); }
static int64_t do_free(ndm_region *region) { return ndm_region_free(region, 0); }
static int64_t do_free_many(ndm_region *region) { return ndm_region_free_many(region, &first_slot, 1); }
static int64_t do_contains(ndm_region *region) { return ndm_region_contains(region, 0); }

static int64_t do_slot(ndm_region *region)
{
    ndm_slot out;
    return ndm_region_slot(region, 0, &out);
}

static int64_t do_stats(ndm_region *region)
{
    ndm_stats out;
    return ndm_region_stats(region, &out);
}

static int64_t do_info(ndm_region *region)
{
    ndm_info out;
    return ndm_region_info(region, &out);
}

static int64_t do_set_max_capacity(ndm_region *region) { return ndm_region_set_max_capacity(region, 1 << 23); }
static int64_t do_trim(ndm_region *region) { return ndm_region_trim(region); }

static int64_t do_compact(ndm_region *region)
{
    ndm_compaction out;
    return ndm_region_compact(region, UINT64_MAX, &out);
}

static int64_t do_evict(ndm_region *region) { return ndm_region_evict(region, NULL, 0); }
static int64_t do_prefetch(ndm_region *region) { return ndm_region_prefetch(region, &first_slot, 1); }
static int64_t do_flush(ndm_region *region) { return ndm_region_flush(region); }
static int64_t do_allow_leases(ndm_region *region) { return ndm_region_allow_leases(region); }

static int64_t do_share(ndm_region *region)
{
    ndm_shared out;
    return ndm_region_share(region, 0, &out);
}

static int64_t do_check(ndm_region *region) { return ndm_region_check(region); }
static int64_t do_handle(ndm_region *region) { return ndm_region_handle(region) ? 0 : ndm_last_error()->status; }

/* Closing what is closed is fine from anywhere. */
static int64_t do_close(ndm_region *region)
{
    const int status = ndm_region_close(region);
    return status == NDM_OK && ndm_region_is_closed(region) ? NDM_ERR_CLOSED : status;
}

static int64_t (*const verbs[])(ndm_region *) = {
    do_write,     do_write_vectored, do_write_many, do_write_packed, do_allocate,         do_commit,       do_read,
    do_try_read,  do_restore,        do_read_into,  do_read_many,    do_load_many,        do_pin,          do_free,
    do_free_many, do_contains,       do_slot,       do_stats,        do_info,             do_trim,         do_compact,
    do_evict,     do_flush,          do_share,      do_check,        do_set_max_capacity, do_allow_leases, do_handle,
    do_prefetch,  do_close,
};
enum { VERBS = sizeof verbs / sizeof *verbs };

static const char *const names[] = {
    "write",    "write_vectored", "write_many", "write_packed", "allocate",         "commit",       "read",
    "try_read", "restore",        "read_into",  "read_many",    "load_many",        "pin",          "free",
    "free_many", "contains",      "slot",       "stats",        "info",             "trim",         "compact",
    "evict",    "flush",          "share",      "check",        "set_max_capacity", "allow_leases", "handle",
    "prefetch", "close",
};
_Static_assert(sizeof names / sizeof *names == VERBS, "a name for each verb");

static void must_be_refused(const char *verb, int64_t result)
{
    if (result == NDM_ERR_WRONG_THREAD || result == NDM_ERR_CLOSED)
        return;
    fprintf(stderr, "%s on a foreign thread gave %lld\n", verb, (long long)result);
    exit(1);
}

static void call_by_handle(uint64_t handle)
{
    uint8_t buffer[64];
    must_be_refused("h_write", ndm_h_write(handle, (const uint8_t *)text, sizeof text, 0));
    must_be_refused("h_read_into", ndm_h_read_into(handle, 0, buffer, sizeof buffer));
    must_be_refused("h_pin", or_error(ndm_h_pin(handle, 0, NULL)));
    must_be_refused("h_free", ndm_h_free(handle, 0));
    must_be_refused("h_contains", ndm_h_contains(handle, 0));
    must_be_refused("h_size", ndm_h_size(handle, 0));
    must_be_refused("h_region", or_error(ndm_h_region(handle)));
}

/* ---- the threads ---------------------------------------------------------------------------------------- */

/* Some calls on whatever region the owner shows at the moment. */
static void intrude(unsigned *turn)
{
    ndm_region *region = atomic_load(&shared);
    if (!region)
        return;
    for (int i = 0; i < 4; i++) {
        const unsigned which = (*turn)++ % VERBS;
        must_be_refused(names[which], verbs[which](region));
    }
    ndm_region_is_closed(region);
    ndm_region_in_memory(region);
    call_by_handle(atomic_load(&shared_handle));
    atomic_fetch_add(&calls, 13);
}

static void *stranger(void *argument)
{
    const unsigned number = (unsigned)(uintptr_t)argument;
    unsigned turn = number * 7;
    for (; !atomic_load(&stop); atomic_fetch_add(&rounds[number], 1))
        intrude(&turn);
    return NULL;
}

/* One that owns a region, and opens another now and then. */
static void *neighbour(void *argument)
{
    const unsigned number = (unsigned)(uintptr_t)argument;
    unsigned turn = number * 7;
    ndm_region *own = open_region();
    for (uint64_t i = 1; !atomic_load(&stop); i++, atomic_fetch_add(&rounds[number], 1)) {
        intrude(&turn);
        if (i % 1000 == 0) {
            ndm_region_destroy(own);
            own = open_region();
        }
        if (i % 100 == 0)
            CHECK(ndm_region_write(own, text, sizeof text, 1) >= 0);
    }
    CHECK(ndm_region_check(own) == 0);
    ndm_region_destroy(own);
    return NULL;
}

static void *visit(void *turn)
{
    intrude(turn);
    return NULL;
}

/* Threads that live for a few calls: what the system knows a thread by is used again. */
static void *visitors(void *argument)
{
    const unsigned number = (unsigned)(uintptr_t)argument;
    unsigned turn = 0;
    for (; !atomic_load(&stop); atomic_fetch_add(&rounds[number], 1)) {
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, visit, &turn) == 0 && pthread_join(thread, NULL) == 0);
    }
    return NULL;
}

/* Work that would show any other hand in the region. */
static void work(ndm_region *region)
{
    char expected[VALUES][200];
    int64_t slots[VALUES];
    ndm_info info;
    for (int i = 0; i < VALUES; i++) {
        memset(expected[i], 'a' + i, sizeof expected[i]);
        CHECK((slots[i] = ndm_region_write(region, expected[i], sizeof expected[i], 0)) == i);
    }
    for (int i = 0; i < VALUES; i++) {
        uint64_t size;
        const char *view = ndm_region_read(region, slots[i], &size);
        CHECK(view && size == sizeof expected[i] && memcmp(view, expected[i], sizeof expected[i]) == 0);
        ndm_view_release(view);
    }
    CHECK(ndm_region_free(region, slots[3]) == NDM_OK);
    CHECK(ndm_region_info(region, &info) == NDM_OK);
    CHECK(info.live_slots == VALUES - 1 && info.slot_count == VALUES && info.max_capacity == 1 << 22);
    CHECK(ndm_region_check(region) == 0);
}

/* No foreign thread has a pointer any more that was shown before. */
static void wait_for_all(void)
{
    for (unsigned i = 0; i < STRANGERS + NEIGHBOURS + 1; i++)
        for (const uint64_t seen = atomic_load(&rounds[i]); atomic_load(&rounds[i]) < seen + 2;)
            sched_yield();
}

static double now(void)
{
    struct timespec moment;
    clock_gettime(CLOCK_MONOTONIC, &moment);
    return (double)moment.tv_sec + (double)moment.tv_nsec * 1e-9;
}

int main(void)
{
    const char *given = getenv("SECONDS");
    const double end = now() + (given ? atof(given) : 2);
    pthread_t threads[STRANGERS + NEIGHBOURS + 1];
    for (uintptr_t i = 0; i < STRANGERS + NEIGHBOURS + 1; i++)
        CHECK(pthread_create(&threads[i], NULL, i < STRANGERS ? stranger : i < STRANGERS + NEIGHBOURS ? neighbour : visitors,
                             (void *)i) == 0);
    uint64_t opened = 0;
    while (now() < end) {
        ndm_region *regions[BATCH];
        for (int i = 0; i < BATCH; i++) {
            regions[i] = open_region();
            const uint64_t handle = ndm_region_handle(regions[i]);
            CHECK(handle);
            atomic_store(&shared, regions[i]);
            atomic_store(&shared_handle, handle);
            work(regions[i]);
            CHECK(ndm_region_close(regions[i]) == NDM_OK);
            CHECK(ndm_region_close(regions[i]) == NDM_OK && ndm_region_is_closed(regions[i]));
        }
        atomic_store(&shared, NULL);
        wait_for_all();
        for (int i = 0; i < BATCH; i++)
            ndm_region_destroy(regions[i]);
        opened += BATCH;
    }
    atomic_store(&stop, 1);
    for (unsigned i = 0; i < STRANGERS + NEIGHBOURS + 1; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    printf("foreign threads: %llu calls refused while %llu regions were opened and closed\n",
           (unsigned long long)atomic_load(&calls), (unsigned long long)opened);
    CHECK(opened > 0 && atomic_load(&calls) > 0);
    return 0;
}
