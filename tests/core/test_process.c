/* Regions that every thread of the process may use: all threads call every verb of one region, by pointer and by handle,
 * while others fork and, in the end, one of them closes it. Each value says what it is, so any thread can tell whether it is
 * whole.
 *
 *   make stress SECONDS=60 PROGRAMS=test_process
 */
#define _GNU_SOURCE
#include "check.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { THREADS = 4, BOARD = 64, MOST = 200 << 10, BATCH = 5 };

static ndm_region *region;
static uint64_t handle;
static _Atomic bool closing, closed;
static _Atomic uint64_t calls;

/* Slots that whoever comes by may read; who takes one off the board frees it. */
static int64_t board[BOARD];
static pthread_mutex_t board_lock = PTHREAD_MUTEX_INITIALIZER;

static double now(void)
{
    struct timespec moment;
    clock_gettime(CLOCK_MONOTONIC, &moment);
    return (double)moment.tv_sec + (double)moment.tv_nsec * 1e-9;
}

static uint32_t next(uint32_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 17;
    return *state ^= *state << 5;
}

/* ---- values --------------------------------------------------------------------------------------------- */

/* Its size, and then numbers that follow from a seed. */
static uint64_t fill(uint64_t *value, uint32_t *state)
{
    const uint32_t kind = next(state) % 16;
    uint64_t size = kind == 0 ? 64 + next(state) % MOST : kind < 4 ? 64 + next(state) % 16384 : 64 + next(state) % 512;
    size &= ~(uint64_t)7;
    value[0] = size;
    value[1] = next(state);
    for (uint64_t i = 2; i < size / 8; i++)
        value[i] = value[1] * i;
    return size;
}

static void check_value(const void *bytes, uint64_t size)
{
    const uint64_t *value = bytes;
    const uint64_t noted = __atomic_load_n(value, __ATOMIC_ACQUIRE);
    CHECK(size >= 64);
    if (noted == 0) /* another thread has got the slot meanwhile, by ndm_region_allocate(), and fills it now */
        return;
    CHECK(noted == size);
    for (uint64_t i = 2; i < size / 8; i++)
        CHECK(value[i] == value[1] * i);
}

/* Did a verb do it? If not, the region is closed, or what was named is not there any more. */
static bool done(int64_t result)
{
    atomic_fetch_add(&calls, 1);
    if (result >= 0)
        return true;
    CHECK(result == NDM_ERR_FREED_SLOT || result == NDM_ERR_NO_SLOT || result == NDM_ERR_WAIT ||
          (result == NDM_ERR_CLOSED && atomic_load(&closing)));
    return false;
}

static int64_t of(const void *pointer) { return pointer ? 0 : ndm_last_error()->status; }

/* ---- the verbs ------------------------------------------------------------------------------------------ */

static void put_on_board(int64_t slot, uint32_t *state)
{
    pthread_mutex_lock(&board_lock);
    int64_t *place = &board[next(state) % BOARD];
    const int64_t before = *place;
    *place = slot;
    pthread_mutex_unlock(&board_lock);
    if (before >= 0)
        CHECK(ndm_region_free(region, before) == NDM_OK || done(ndm_last_error()->status) || atomic_load(&closing));
}

static int64_t write_one(uint64_t *room, uint32_t *state)
{
    const uint64_t size = fill(room, state);
    const void *parts[] = {room, (char *)room + 64};
    const uint64_t sizes[] = {64, size - 64};
    const int64_t length = (int64_t)size;
    int64_t slot = -1;
    int status;
    char *view;
    switch (next(state) % 5) {
    case 0:
        return ndm_region_write_vectored(region, parts, sizes, 2, 0, 1);
    case 1:
        status = ndm_region_write_packed(region, room, size, &length, 1, 2, &slot);
        return status < 0 ? status : slot;
    case 2:
        if ((slot = ndm_region_allocate(region, size, 3, &view)) >= 0) {
            memcpy(view + 8, room + 1, size - 8);
            __atomic_store_n((uint64_t *)(void *)view, size, __ATOMIC_RELEASE);
            CHECK(ndm_region_commit(region, slot) == NDM_OK || atomic_load(&closing));
            ndm_view_release(view);
        }
        return slot;
    case 3:
        return ndm_h_write(handle, (const uint8_t *)room, size, 4);
    default:
        return ndm_region_write(region, room, size, 0);
    }
}

static void write_batch(uint64_t *room, uint32_t *state)
{
    const void *parts[BATCH];
    uint64_t sizes[BATCH], used = 0;
    int64_t slots[BATCH];
    for (int i = 0; i < BATCH; i++, used += sizes[i - 1] / 8) {
        parts[i] = room + used;
        sizes[i] = fill(room + used, state);
    }
    if (!done(ndm_region_write_many(region, parts, sizes, BATCH, 5, slots)))
        return;
    for (int i = 0; i < BATCH - 1; i++)
        put_on_board(slots[i], state);
    CHECK(ndm_region_free_many(region, &slots[BATCH - 1], 1) == NDM_OK || atomic_load(&closing));
}

static void take_view(int64_t slot, uint32_t *state)
{
    uint64_t size = 0;
    const char *view = NULL;
    switch (next(state) % 4) {
    case 0:
        if (ndm_region_try_read(region, slot, &view, &size) != NDM_OK)
            return;
        break;
    case 1:
        view = (const char *)ndm_h_pin(handle, slot, &size);
        break;
    case 2:
        view = ndm_region_restore(region, slot, &size);
        break;
    default:
        view = ndm_region_read(region, slot, &size);
    }
    if (!done(of(view)))
        return;
    check_value(view, size);
    ndm_view_release(view);
}

static void copy_out(int64_t slot, uint64_t *room, uint32_t *state)
{
    const bool by_handle = next(state) % 2;
    const int64_t size = by_handle ? ndm_h_read_into(handle, slot, (uint8_t *)room, MOST + 64)
                                   : ndm_region_read_into(region, slot, room, MOST + 64);
    if (done(size))
        check_value(room, (uint64_t)size);
}

/* What lies on the board, as a batch. */
static void read_batch(uint64_t *room, uint32_t *state)
{
    int64_t slots[BATCH], lengths[BATCH];
    const char *views[BATCH];
    uint64_t sizes[BATCH];
    pthread_mutex_lock(&board_lock);
    const uint32_t from = next(state) % (BOARD - BATCH);
    memcpy(slots, board + from, sizeof slots);
    pthread_mutex_unlock(&board_lock);
    const uint32_t which = next(state) % 4;
    if (which == 0 && done(ndm_region_read_many(region, slots, BATCH, views, sizes))) {
        for (int i = 0; i < BATCH; i++) {
            check_value(views[i], sizes[i]);
            ndm_view_release(views[i]);
        }
    } else if (which == 1 && done(ndm_region_load_many(region, slots, BATCH, room, BATCH * (MOST + 64), lengths))) {
        const char *at = (const char *)room;
        for (int i = 0; i < BATCH; at += lengths[i++])
            check_value(at, (uint64_t)lengths[i]);
    } else if (which == 2) {
        done(ndm_region_prefetch(region, slots, BATCH));
    } else if (which == 3) {
        done(ndm_region_evict(region, slots, BATCH));
    }
}

static void look(int64_t slot, uint32_t *state)
{
    ndm_info info;
    ndm_stats stats;
    ndm_slot facts;
    ndm_shared shared;
    switch (next(state) % 10) {
    case 0:
        if (done(ndm_region_stats(region, &stats)))
            CHECK(stats.used_bytes <= stats.capacity && stats.live_slots <= stats.slot_count);
        break;
    case 1:
        done(ndm_region_slot(region, slot, &facts));
        break;
    case 2:
        done(ndm_region_contains(region, slot));
        done(ndm_h_contains(handle, slot));
        break;
    case 3:
        done(ndm_h_size(handle, slot));
        done(of(ndm_h_region(handle)));
        break;
    case 4:
        done(ndm_region_set_max_capacity(region, 1 << 28));
        break;
    case 5:
        done(ndm_region_release_ownership(region)); /* nothing */
        done(ndm_region_adopt(region));
        break;
    case 6:
        if (done(ndm_region_allow_leases(region)))
            done(ndm_region_share(region, slot, &shared));
        break;
    case 7:
        done(ndm_region_is_locked(region));
        CHECK(!ndm_region_is_closed(region) || atomic_load(&closing));
        break;
    case 8:
        CHECK(ndm_region_handle(region) == handle || atomic_load(&closing));
        break;
    default:
        if (done(ndm_region_info(region, &info)))
            CHECK(info.live_slots <= info.slot_count && info.alignment == 64);
    }
}

static void maintain(uint32_t *state)
{
    ndm_compaction moved;
    int64_t broken;
    switch (next(state) % 5) {
    case 0:
        done(ndm_region_trim(region));
        break;
    case 1:
        done(ndm_region_compact(region, 1 << 20, &moved));
        break;
    case 2:
        done(ndm_region_evict(region, NULL, 0));
        break;
    case 3:
        done(ndm_region_flush(region));
        break;
    default:
        if (done(broken = ndm_region_check(region)))
            CHECK(broken == 0);
    }
}

static void *work(void *argument)
{
    uint32_t state = 12345 + 7919 * (uint32_t)(uintptr_t)argument;
    uint64_t *room = malloc(BATCH * (MOST + 64));
    CHECK(room);
    while (!atomic_load(&closed)) {
        pthread_mutex_lock(&board_lock);
        const int64_t slot = board[next(&state) % BOARD];
        pthread_mutex_unlock(&board_lock);
        const uint32_t what = next(&state) % 64;
        if (what < 20) {
            const int64_t fresh = write_one(room, &state);
            if (done(fresh))
                put_on_board(fresh, &state);
        } else if (what < 24)
            write_batch(room, &state);
        else if (what < 40)
            take_view(slot, &state);
        else if (what < 48)
            copy_out(slot, room, &state);
        else if (what < 56)
            read_batch(room, &state);
        else if (what < 63)
            look(slot, &state);
        else
            maintain(&state);
    }
    free(room);
    return NULL;
}

/* ---- the rest ------------------------------------------------------------------------------------------- */

/* A child has no way in, whatever the threads of its parent are in the midst of; and its copies go. */
static void fork_once(void)
{
#if !defined(__SANITIZE_THREAD__)
    uint64_t size;
    int status;
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        alarm(20);
        CHECK(ndm_region_write(region, &size, sizeof size, 0) == NDM_ERR_WRONG_THREAD);
        CHECK(!ndm_region_read(region, 0, &size) && ndm_last_error()->status == NDM_ERR_WRONG_THREAD);
        CHECK(ndm_region_try_read(region, 0, NULL, &size) == NDM_ERR_WRONG_THREAD);
        CHECK(ndm_region_adopt(region) == NDM_ERR_WRONG_THREAD);
        CHECK(ndm_h_contains(handle, 0) == NDM_ERR_WRONG_THREAD);
        CHECK(ndm_region_close(region) == NDM_ERR_WRONG_THREAD);
        ndm_region_destroy(region);
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child && status == 0);
#endif
}

static void run(uint64_t cache_limit, double seconds)
{
    const ndm_options options = {.initial_capacity = 1 << 20, .max_capacity = 1 << 27, .alignment = 64,
                                 .cache_limit = cache_limit, .ownership = NDM_OWNED_BY_PROCESS};
    pthread_t threads[THREADS];
    const double end = now() + seconds;
    atomic_store(&closing, false);
    atomic_store(&closed, false);
    memset(board, -1, sizeof board);
    CHECK((region = ndm_region_open_temporary("/var/tmp", &options)) && (handle = ndm_region_handle(region)));
    for (uintptr_t i = 0; i < THREADS; i++)
        CHECK(pthread_create(&threads[i], NULL, work, (void *)i) == 0);
    uint64_t forks = 0;
    for (; now() < end; forks++) {
        fork_once();
        nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    }
    int64_t broken = ndm_region_check(region);
    CHECK(broken == 0);
    atomic_store(&closing, true); /* with the threads inside of verbs */
    CHECK(ndm_region_close(region) == NDM_OK && ndm_region_close(region) == NDM_OK);
    nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    atomic_store(&closed, true);
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    ndm_region_destroy(region);
    CHECK(!ndm_h_region(handle));
    printf("every thread's region, %s limit: %llu calls, %llu forks\n", cache_limit == UINT64_MAX ? "no" : "with a",
           (unsigned long long)atomic_exchange(&calls, 0), (unsigned long long)forks);
}

int main(void)
{
    const char *given = getenv("SECONDS");
    const double seconds = given ? atof(given) : 4;
    run(UINT64_MAX, seconds / 2);
    run(4 << 20, seconds / 2);
    return 0;
}
