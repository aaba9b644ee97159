/* The C API end to end, without Python: values, views, threads, forks, and what the system may refuse. Run under
 * sanitizers by `make test-native` and under valgrind by `make valgrind`. Prints a line a group; exits 1 at the first
 * thing that is wrong. */
#define _GNU_SOURCE
#include "check.h"
#include "emulated.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define FAILS(status_, call)                                                        \
    do {                                                                            \
        CHECK((int64_t)(call) == (status_));                                        \
        CHECK(ndm_last_error()->status == (status_) && ndm_last_error()->message); \
    } while (0)

#define OPTIONS(initial, most, align, cache)                                                            \
    ((ndm_options){.initial_capacity = (initial), .max_capacity = (most), .alignment = (align), .cache_limit = (cache)})

enum { KIB = 1024, MIB = 1024 * 1024 };

static char directory[] = "/tmp/nodedb-mem-test-XXXXXX";
static char path[100], slots_path[110];
static const ndm_options small = {
    .initial_capacity = 64 * KIB, .max_capacity = 64 * MIB, .alignment = 64, .cache_limit = UINT64_MAX};

/* ---- a file system that refuses: fallocate() of the core is this one --------------------------------------- */

static _Thread_local struct {
    int allocate, punch; /* the errno to fail with, once */
    int calls;
} refuse;

int fallocate(int fd, int mode, off_t offset, off_t size)
{
    int *refused = mode & FALLOC_FL_PUNCH_HOLE ? &refuse.punch : &refuse.allocate;
    refuse.calls++;
    if (*refused) {
        errno = *refused;
        *refused = 0;
        return -1;
    }
    return (int)syscall(SYS_fallocate, fd, mode, offset, size);
}

/* ---- helpers -------------------------------------------------------------------------------------------- */

static uint8_t *pattern(uint64_t size, unsigned seed)
{
    uint8_t *bytes = malloc(size + 1);
    for (uint64_t i = 0; i < size; i++)
        bytes[i] = (uint8_t)(i * 31 + i / 251 + seed);
    return bytes;
}

static int64_t store(ndm_region *region, uint64_t size, unsigned seed)
{
    uint8_t *bytes = pattern(size, seed);
    int64_t slot = ndm_region_write(region, bytes, size, seed % 256);
    free(bytes);
    return slot;
}

static ndm_info info_of(ndm_region *region)
{
    ndm_info info = {0};
    CHECK(ndm_region_info(region, &info) == NDM_OK);
    return info;
}

static int holds(const char *view, uint64_t size, unsigned seed)
{
    uint8_t *bytes = pattern(size, seed);
    int equal = memcmp(view, bytes, size) == 0;
    free(bytes);
    return equal;
}

static const char *view_of(ndm_region *region, int64_t slot)
{
    uint64_t size;
    const char *view = ndm_region_read(region, slot, &size);
    CHECK(view);
    return view;
}

static void check_value(ndm_region *region, int64_t slot, uint64_t size, unsigned seed)
{
    uint64_t found;
    const char *view = ndm_region_read(region, slot, &found);
    CHECK(view && found == size && holds(view, size, seed));
    ndm_view_release(view);
}

static ndm_region *open_new(const ndm_options *options)
{
    unlink(path);
    unlink(slots_path);
    ndm_region *region = ndm_region_open(path, options);
    CHECK(region);
    return region;
}

static void finish(ndm_region *region)
{
    if (!ndm_region_is_closed(region))
        CHECK(ndm_region_check(region) == 0);
    ndm_region_destroy(region);
}

static void *in_thread(void *(*work)(void *), void *argument)
{
    pthread_t thread;
    void *result;
    CHECK(pthread_create(&thread, NULL, work, argument) == 0);
    CHECK(pthread_join(thread, &result) == 0);
    return result;
}

/* Run `work` in a child; it has to return. */
static void in_child(void (*work)(void *), void *argument)
{
    fflush(NULL);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        work(argument);
        execl("/bin/true", "true", NULL); /* what is inherited is given up: no leak check at its end */
        _exit(127);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void group(const char *name) { printf("ok  %s\n", name); }

/* ---- values and views ----------------------------------------------------------------------------------- */

static void test_values(void)
{
    static const uint64_t sizes[] = {0, 1, 13, 4095, 4096, 4097, 70000, 262143, 262144, 524288, 700001, 3000000};
    enum { COUNT = sizeof sizes / sizeof *sizes };
    ndm_region *region = open_new(&small);
    int64_t slots[COUNT];
    uint64_t total = 0;
    for (unsigned i = 0; i < COUNT; i++) {
        CHECK((slots[i] = store(region, sizes[i], i)) == i);
        total += sizes[i];
    }
    for (unsigned i = 0; i < COUNT; i++) {
        uint8_t *copy = malloc(sizes[i] + 1);
        ndm_slot facts;
        check_value(region, slots[i], sizes[i], i);
        CHECK(ndm_region_read_into(region, slots[i], copy, sizes[i]) == (int64_t)sizes[i]);
        CHECK(holds((char *)copy, sizes[i], i));
        CHECK(ndm_region_slot(region, slots[i], &facts) == NDM_OK);
        CHECK(facts.size == sizes[i] && facts.engine == i && facts.occupied && facts.offset % 64 == 0);
        free(copy);
    }
    ndm_stats stats;
    CHECK(ndm_region_stats(region, &stats) == NDM_OK);
    CHECK(stats.live_bytes == total && stats.live_slots == COUNT && stats.engine_bytes[4] == 4096 && stats.growths > 0);
    CHECK(info_of(region).live_bytes == total && info_of(region).capacity == stats.capacity);
    for (unsigned i = 0; i < COUNT; i += 2)
        CHECK(ndm_region_free(region, slots[i]) == NDM_OK);
    CHECK(ndm_region_check(region) == 0);
    for (unsigned i = 1; i < COUNT; i += 2)
        check_value(region, slots[i], sizes[i], i);
    finish(region);
    group("values of any size come back as written");
}

static void test_views(void)
{
    ndm_region *region = open_new(&OPTIONS(64 * KIB, 64 * KIB, 64, UINT64_MAX));
    int64_t slot = store(region, 5000, 1);
    const char *first = view_of(region, slot), *again = view_of(region, slot);
    CHECK(first == again);
    CHECK(ndm_region_free(region, slot) == NDM_OK);
    ndm_view_release(first);
    CHECK(store(region, 5000, 2) >= 0 && holds(again, 5000, 1));
    /* Past the reserved address space while a view lives: the mapping is doubled. */
    CHECK(ndm_region_set_max_capacity(region, 64 * MIB) == NDM_OK);
    int64_t big = store(region, 6 * MIB, 3);
    CHECK(big >= 0 || !can_double_mappings());
    if (big >= 0)
        check_value(region, big, 6 * MIB, 3);
    CHECK(holds(again, 5000, 1));
    ndm_stats stats;
    CHECK(ndm_region_stats(region, &stats) == NDM_OK && stats.pinned_bytes == 5056);
    ndm_view_release(again);
    CHECK(ndm_region_stats(region, &stats) == NDM_OK && stats.pinned_bytes == 0);
    CHECK(big >= 0 || store(region, 6 * MIB, 3) >= 0); /* moved, now that nobody looks */
    const char *last = view_of(region, store(region, 100, 4));
    CHECK(ndm_region_write(region, last, 100, 0) >= 0);
    CHECK(ndm_region_close(region) == NDM_OK && holds(last, 100, 4));
    CHECK(!ndm_region_open(path, &small) && ndm_last_error()->status == NDM_ERR_BUSY);
    ndm_region_destroy(region);
    CHECK(holds(last, 100, 4));
    ndm_view_release(last);
    finish(ndm_region_open(path, &OPTIONS(1, 64 * MIB, 1, UINT64_MAX)));
    ndm_view_release(NULL);
    group("views outlast free, growth, close and destroy");
}

static bool waits(ndm_region *region, int64_t slot)
{
    uint64_t size = 77;
    const char *view = NULL;
    CHECK(ndm_region_free(region, 1 << 20) == NDM_ERR_NO_SLOT); /* which stays the last error */
    const int status = ndm_region_try_read(region, slot, &view, &size);
    CHECK(status == NDM_OK ? size != 77 : status == NDM_ERR_WAIT && size == 77 && !view);
    CHECK(ndm_last_error()->status == NDM_ERR_NO_SLOT);
    ndm_view_release(view);
    return status == NDM_ERR_WAIT;
}

/* After a read it is at hand for the rest of the second, which may end in between. */
static bool waits_after_reading(ndm_region *region, int64_t slot)
{
    bool again = true;
    for (int tries = 0; again && tries < 5; tries++) {
        ndm_view_release(view_of(region, slot));
        again = waits(region, slot);
    }
    return again;
}

static void test_reads_that_must_not_wait(void)
{
    ndm_region *region = open_new(&small);
    const int64_t slots[] = {store(region, 0, 1), store(region, 100, 1), store(region, MIB, 2)};
    CHECK(!waits(region, slots[0]) && !waits(region, slots[1]) && !waits_after_reading(region, slots[2]));
    CHECK(ndm_region_evict(region, NULL, 0) == NDM_OK);
    CHECK(waits(region, slots[2]) && !waits_after_reading(region, slots[2]));
    CHECK(waits(region, slots[1]) && !waits_after_reading(region, slots[1]));
    CHECK(!waits(region, slots[0]));
    CHECK(ndm_region_free(region, slots[1]) == NDM_OK);
    uint64_t size = 77;
    const char *view = NULL;
    FAILS(NDM_ERR_FREED_SLOT, ndm_region_try_read(region, slots[1], &view, &size));
    CHECK(!view && size == 77);
    /* What ends at once, and what would unmap. */
    CHECK(ndm_view_try_release(NULL) == NDM_OK && ndm_view_try_release(view_of(region, slots[0])) == NDM_OK);
    view = view_of(region, slots[2]);
    CHECK(ndm_view_try_release(view_of(region, slots[2])) == NDM_OK && ndm_view_try_release(view) == NDM_ERR_WAIT);
    CHECK(holds(view, MIB, 2));
    ndm_view_release(view);
    const char *restored = ndm_region_restore(region, slots[2], &size);
    CHECK(restored && ndm_view_try_release(restored) == NDM_ERR_WAIT && holds(restored, MIB, 2));
    ndm_view_release(restored);
    ndm_stats stats;
    CHECK(ndm_region_stats(region, &stats) == NDM_OK && stats.pinned_bytes == 0);
    view = view_of(region, slots[2]);
    CHECK(ndm_region_close(region) == NDM_OK && ndm_view_try_release(view) == NDM_ERR_WAIT && holds(view, MIB, 2));
    ndm_view_release(view);
    ndm_region_destroy(region);
    ndm_options keeps = small;
    keeps.keep_mapped = 1;
    region = open_new(&keeps);
    CHECK(ndm_view_try_release(view_of(region, store(region, MIB, 3))) == NDM_OK);
    ndm_region_destroy(region);
    group("what must not wait says where it would");
}

static void test_space(void)
{
    enum { COUNT = 200, SIZE = 20000 };
    ndm_region *region = open_new(&small);
    int64_t slots[COUNT];
    struct stat facts;
    for (unsigned i = 0; i < COUNT; i++)
        CHECK((slots[i] = store(region, SIZE, i)) >= 0);
    for (unsigned i = 0; i < COUNT; i++)
        if (i % 4)
            CHECK(ndm_region_free(region, slots[i]) == NDM_OK);
    const char *pinned = view_of(region, slots[COUNT - 4]);
    ndm_compaction done;
    CHECK(ndm_region_compact(region, 2 * SIZE, &done) == NDM_OK);
    CHECK(done.moved_bytes <= 2 * SIZE && done.remaining_bytes > 0);
    CHECK(ndm_region_compact(region, UINT64_MAX, &done) == NDM_OK && done.remaining_bytes == 0);
    CHECK(holds(pinned, SIZE, COUNT - 4));
    ndm_view_release(pinned);
    CHECK(ndm_region_compact(region, UINT64_MAX, &done) == NDM_OK);
    CHECK(info_of(region).used_bytes <= info_of(region).live_bytes * 102 / 100 + COUNT * 64);
    CHECK(ndm_region_trim(region) > 0);
    CHECK(stat(path, &facts) == 0 && (uint64_t)facts.st_size == info_of(region).capacity);
    CHECK((uint64_t)facts.st_blocks * 512 <= info_of(region).used_bytes + 64 * KIB);
    for (unsigned i = 0; i < COUNT; i += 4)
        check_value(region, slots[i], SIZE, i);
    CHECK(store(region, 4 * MIB, 9) >= 0);
    finish(region);
    group("compact and trim keep every value");
}

/* ---- misuse --------------------------------------------------------------------------------------------- */

static void test_arguments(void)
{
    const ndm_options wrong[] = {OPTIONS(0, 1, 1, 0),    OPTIONS(1, 0, 1, 0), OPTIONS(2, 1, 1, 0), OPTIONS(1, 1, 0, 0),
                                 OPTIONS(1, 1, 8192, 0), OPTIONS(1, 1, 3, 0),
                                 OPTIONS(1, (uint64_t)INT64_MAX + 1, 1, 0)};
    unlink(path); /* of a file that is there nobody looks at the initial capacity */
    for (unsigned i = 0; i < sizeof wrong / sizeof *wrong; i++)
        CHECK(!ndm_region_open(path, &wrong[i]) && ndm_last_error()->status == NDM_ERR_ARGUMENT);
    CHECK(access(path, F_OK) != 0);
    ndm_region *region = open_new(&OPTIONS(4096, 8192, 64, UINT64_MAX));
    FAILS(NDM_ERR_ARGUMENT, ndm_region_write(region, "x", 1, -1));
    FAILS(NDM_ERR_ARGUMENT, ndm_region_write(region, "x", 1, 256));
    FAILS(NDM_ERR_CAPACITY, ndm_region_write(region, "x", 8193, 0));
    CHECK(ndm_last_error()->required == 8193 && ndm_last_error()->limit == 8192);
    FAILS(NDM_ERR_CAPACITY, ndm_region_write(region, "x", UINT64_MAX, 0));
    FAILS(NDM_ERR_ARGUMENT, ndm_region_set_max_capacity(region, 8191));
    FAILS(NDM_ERR_ARGUMENT, ndm_region_set_max_capacity(region, UINT64_MAX));
    CHECK(ndm_region_set_max_capacity(region, INT64_MAX) == NDM_OK && info_of(region).max_capacity == INT64_MAX);
    FAILS(NDM_ERR_CAPACITY, ndm_region_write(region, "x", (uint64_t)1 << 48, 0));
    FAILS(NDM_ERR_NO_SLOT, ndm_region_free(region, 0));
    FAILS(NDM_ERR_NO_SLOT, ndm_region_free(region, -1));
    int64_t slot = store(region, 10, 0);
    ndm_slot facts = {.generation = 0};
    uint64_t size = 77;
    CHECK(ndm_region_free(region, slot) == NDM_OK);
    FAILS(NDM_ERR_FREED_SLOT, ndm_region_free(region, slot));
    CHECK(!ndm_region_read(region, slot, &size) && size == 77 && ndm_last_error()->status == NDM_ERR_FREED_SLOT);
    CHECK(ndm_region_slot(region, slot, &facts) == NDM_OK && !facts.occupied && facts.generation == 1);
    CHECK(ndm_region_contains(region, slot) == 0 && ndm_region_contains(region, INT64_MAX) == 0);
    CHECK(!ndm_region_open(path, &small) && ndm_last_error()->status == NDM_ERR_BUSY);
    finish(region);
    CHECK(!ndm_region_open("/nowhere/at all", &small) && ndm_last_error()->os_errno == ENOENT);
    CHECK(!ndm_region_open(directory, &small) && ndm_last_error()->status == NDM_ERR_IO);
    group("wrong arguments are refused");
}

/* Every verb of `region` has to give this status. */
static void check_refused(ndm_region *region, int status)
{
    const char *view = NULL;
    ndm_stats stats;
    ndm_info info;
    ndm_slot facts;
    ndm_compaction done;
    uint64_t size;
    char buffer[8];
    FAILS(status, ndm_region_write(region, "x", 1, 0));
    FAILS(status, ndm_region_free(region, 0));
    FAILS(status, ndm_region_read(region, 0, &size) ? 0 : ndm_last_error()->status);
    FAILS(status, ndm_region_try_read(region, 0, &view, &size));
    FAILS(status, ndm_region_read_into(region, 0, buffer, sizeof buffer));
    FAILS(status, ndm_region_slot(region, 0, &facts));
    FAILS(status, ndm_region_contains(region, 0));
    FAILS(status, ndm_region_stats(region, &stats));
    FAILS(status, ndm_region_info(region, &info));
    FAILS(status, ndm_region_set_max_capacity(region, INT64_MAX));
    FAILS(status, ndm_region_trim(region));
    FAILS(status, ndm_region_compact(region, 1, &done));
    FAILS(status, ndm_region_check(region));
}

static void *check_wrong_thread(void *region)
{
    check_refused(region, NDM_ERR_WRONG_THREAD);
    FAILS(NDM_ERR_WRONG_THREAD, ndm_region_close(region));
    return NULL;
}

static void *release(void *view)
{
    ndm_view_release(view);
    return NULL;
}

static void *destroy(void *region)
{
    ndm_region_destroy(region);
    return NULL;
}

static void *open_in_thread(void *unused)
{
    (void)unused;
    return ndm_region_open_temporary(directory, &small);
}

static void test_threads(void)
{
    check_refused(NULL, NDM_ERR_CLOSED);
    CHECK(ndm_region_close(NULL) == NDM_OK && ndm_region_is_closed(NULL));
    ndm_region_destroy(NULL);
    ndm_region *region = open_new(&small);
    int64_t slot = store(region, 5000, 1);
    in_thread(check_wrong_thread, region);
    const char *view = view_of(region, slot);
    CHECK(ndm_region_free(region, slot) == NDM_OK);
    in_thread(release, (void *)view);
    CHECK(ndm_region_check(region) == 0);
    CHECK(ndm_region_close(region) == NDM_OK);
    check_refused(region, NDM_ERR_CLOSED);
    in_thread(destroy, region);
    region = in_thread(open_in_thread, NULL); /* its owner is gone, and the next thread is another one */
    check_wrong_thread(region);
    in_thread(check_wrong_thread, region);
    ndm_region_destroy(region);
    group("every verb is the owning thread's alone");
}

/* ---- many threads --------------------------------------------------------------------------------------- */

enum { RELEASERS = 3, ROUNDS = 200, QUEUE = 64 };

static struct {
    pthread_mutex_t lock;
    pthread_cond_t change;
    const char *views[QUEUE];
    unsigned seeds[QUEUE];
    int count, over;
} queue = {.lock = PTHREAD_MUTEX_INITIALIZER, .change = PTHREAD_COND_INITIALIZER};

static void *release_queue(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&queue.lock);
    while (queue.count > 0 || !queue.over) {
        if (queue.count == 0) {
            pthread_cond_wait(&queue.change, &queue.lock);
            continue;
        }
        queue.count--;
        const char *view = queue.views[queue.count];
        const unsigned seed = queue.seeds[queue.count];
        pthread_cond_broadcast(&queue.change);
        pthread_mutex_unlock(&queue.lock);
        CHECK(holds(view, 3000, seed));
        ndm_view_release(view);
        pthread_mutex_lock(&queue.lock);
    }
    pthread_mutex_unlock(&queue.lock);
    return NULL;
}

static void enqueue(const char *view, unsigned seed)
{
    pthread_mutex_lock(&queue.lock);
    while (queue.count == QUEUE)
        pthread_cond_wait(&queue.change, &queue.lock);
    queue.views[queue.count] = view;
    queue.seeds[queue.count++] = seed;
    pthread_cond_broadcast(&queue.change);
    pthread_mutex_unlock(&queue.lock);
}

/* The owner writes, frees, moves and closes while other threads read and drop its views. */
static void test_many_threads(void)
{
    pthread_t threads[RELEASERS];
    for (int i = 0; i < RELEASERS; i++)
        CHECK(pthread_create(&threads[i], NULL, release_queue, NULL) == 0);
    unsigned seed = 0;
    for (int region_number = 0; region_number < 3; region_number++) {
        /* The last one has a background writer, too. */
        ndm_region *region = open_new(&OPTIONS(64 * KIB, 64 * MIB, 64, region_number == 2 ? 0 : UINT64_MAX));
        int64_t slots[8];
        for (int i = 0; i < 8; i++)
            CHECK((slots[i] = store(region, 3000, seed + (unsigned)i)) >= 0);
        for (int round = 0; round < ROUNDS; round++, seed++) {
            int64_t *slot = &slots[round % 8];
            ndm_compaction done;
            enqueue(view_of(region, *slot), seed);
            enqueue(view_of(region, *slot), seed);
            CHECK(ndm_region_free(region, *slot) == NDM_OK);
            CHECK((*slot = store(region, 3000, seed + 8)) >= 0);
            if (region_number == 2) {
                int64_t large = store(region, 300 * KIB, seed);
                CHECK(large >= 0);
                if (round % 32 >= 28) /* most stay: more than may be in RAM */
                    CHECK(ndm_region_free(region, large) == NDM_OK);
            }
            if (round % 16 == 0 && (region_number < 2 || round < 64))
                CHECK(ndm_region_compact(region, UINT64_MAX, &done) == NDM_OK && ndm_region_trim(region) >= 0);
        }
        CHECK(ndm_region_check(region) == 0);
        ndm_region_destroy(region);
        unlink(path); /* the next one is a new file, while views of this one live */
        unlink(slots_path);
    }
    pthread_mutex_lock(&queue.lock);
    queue.over = 1;
    pthread_cond_broadcast(&queue.change);
    pthread_mutex_unlock(&queue.lock);
    for (int i = 0; i < RELEASERS; i++)
        pthread_join(threads[i], NULL);
    group("views end on other threads while the owner works");
}

static void *open_at_once(void *barrier)
{
    pthread_barrier_wait(barrier);
    ndm_region *region = ndm_region_open_temporary(directory, &small);
    CHECK(region && store(region, 10, 1) == 0);
    ndm_region_destroy(region);
    return NULL;
}

/* The first thing that this process does. */
static void test_first_opens(void)
{
    pthread_t threads[4];
    pthread_barrier_t barrier;
    pthread_barrier_init(&barrier, NULL, 4);
    for (int i = 0; i < 4; i++)
        CHECK(pthread_create(&threads[i], NULL, open_at_once, &barrier) == 0);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    pthread_barrier_destroy(&barrier);
    group("several threads may open the first region at once");
}

/* ---- forks ---------------------------------------------------------------------------------------------- */

struct inherited {
    ndm_region *region;
    const char *view;
};

static void as_child(void *argument)
{
    struct inherited *inherited = argument;
    check_refused(inherited->region, NDM_ERR_WRONG_THREAD);
    CHECK(holds(inherited->view, 5000, 1));
    ndm_region_destroy(inherited->region);
    CHECK(holds(inherited->view, 5000, 1));
    CHECK(!ndm_region_open(path, &small) && ndm_last_error()->status == NDM_ERR_BUSY);
    ndm_region *own = ndm_region_open_temporary(directory, &small);
    CHECK(own && store(own, 5000, 2) == 0);
    const char *view = view_of(own, 0);
    CHECK(holds(inherited->view, 5000, 1));
    ndm_view_release(inherited->view); /* the child's copy */
    CHECK(holds(view, 5000, 2));
    ndm_view_release(view);
    finish(own);
}

static void test_fork(void)
{
    ndm_region *region = open_new(&small);
    int64_t slot = store(region, 5000, 1);
    struct inherited inherited = {region, view_of(region, slot)};
    in_child(as_child, &inherited);
    CHECK(ndm_region_free(region, slot) == NDM_OK && store(region, 5000, 3) >= 0);
    CHECK(holds(inherited.view, 5000, 1)); /* the child's release was of its own copy */
    ndm_view_release(inherited.view);
    finish(region);
    group("a forked child reads, owns nothing and frees nothing");
}

/* ---- the system refuses --------------------------------------------------------------------------------- */

static void test_cut_short(void)
{
    ndm_region *region = open_new(&small);
    CHECK(store(region, 1000, 1) == 0);
    CHECK(truncate(path, 0) == 0);
    FAILS(NDM_ERR_IO, store(region, 100000, 2));
    CHECK(ndm_last_error()->os_errno == EIO);
    FAILS(NDM_ERR_IO, store(region, 60 * MIB, 2));
    CHECK(ndm_last_error()->os_errno == EIO && info_of(region).slot_count == 1);
    finish(region);
    group("a file cut short is noticed");
}

static void test_refused_blocks(void)
{
    refuse.allocate = EINTR; /* a signal is no reason */
    ndm_region *region = open_new(&OPTIONS(2 * MIB, 64 * MIB, 64, UINT64_MAX));
    CHECK(store(region, 100, 1) == 0);
    check_value(region, 0, 100, 1);
    refuse.allocate = EIO; /* asked for ahead: no matter */
    CHECK(store(region, 600 * KIB, 2) == 1);
    check_value(region, 1, 600 * KIB, 2);
    refuse.allocate = 0;
    finish(region);
    group("an interrupted or refused request for blocks");
}

/* Blocks that a failed punch has taken are had back before the next store. */
static void test_failed_punch(void)
{
    ndm_region *region = open_new(&OPTIONS(1 * MIB, 64 * MIB, 64, UINT64_MAX));
    CHECK(store(region, 10 * KIB, 1) == 0);
    CHECK(store(region, 100 * KIB, 2) == 1);
    CHECK(store(region, 10 * KIB, 3) == 2);
    refuse.punch = EIO;
    CHECK(ndm_region_trim(region) >= 0 && refuse.punch == 0);
    refuse.calls = 0;
    CHECK(store(region, 90 * KIB, 4) >= 0 && refuse.calls > 0);
    CHECK(ndm_region_free(region, 1) == NDM_OK);
    ndm_stats stats;
    CHECK(ndm_region_stats(region, &stats) == NDM_OK && stats.can_punch == 1);
    refuse.punch = EOPNOTSUPP;
    CHECK(store(region, 400 * KIB, 5) >= 0 && ndm_region_trim(region) >= 0);
    CHECK(ndm_region_stats(region, &stats) == NDM_OK && stats.can_punch == 0);
    check_value(region, 0, 10 * KIB, 1);
    check_value(region, 2, 10 * KIB, 3);
    finish(region);
    group("a punch that failed");
}

/* A limit below the file's size that still admits the value; SIGXFSZ would end this child. */
static void below_the_limit(void *argument)
{
    (void)argument;
    ndm_region *region = ndm_region_open(path, &OPTIONS(4 * MIB, 64 * MIB, 64, UINT64_MAX));
    CHECK(region && store(region, 1000, 1) == 0);
    const struct rlimit limit = {700 * KIB, RLIM_INFINITY};
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    CHECK(store(region, 400 * KIB, 2) == 1);
    CHECK(store(region, 150 * KIB, 3) == 2); /* reaches past the first grain, whose successor ends past the limit */
    FAILS(NDM_ERR_IO, store(region, 900 * KIB, 4));
    CHECK(ndm_last_error()->os_errno == EFBIG);
    FAILS(NDM_ERR_IO, store(region, 10 * MIB, 4));
    CHECK(ndm_last_error()->os_errno == EFBIG);
    check_value(region, 0, 1000, 1);
    check_value(region, 1, 400 * KIB, 2);
    check_value(region, 2, 150 * KIB, 3);
    finish(region);
}

static void test_size_limit(void)
{
    unlink(path);
    unlink(slots_path);
    in_child(below_the_limit, NULL);
    group("a file size limit is an error, never a signal");
}

/* A value that slides over itself, out of RAM and so by pwrite, is moved whole or not at all. */
static void move_past_the_limit(void *argument)
{
    (void)argument;
    ndm_compaction done;
    ndm_region *region = ndm_region_open(path, &OPTIONS(4 * MIB, 64 * MIB, 64, UINT64_MAX));
    CHECK(region && store(region, 100 * KIB, 1) == 0 && store(region, 900 * KIB, 2) == 1);
    CHECK(ndm_region_evict(region, NULL, 0) == NDM_OK && ndm_region_free(region, 0) == NDM_OK);
    const struct rlimit limit = {600 * KIB, RLIM_INFINITY};
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    FAILS(NDM_ERR_IO, ndm_region_compact(region, UINT64_MAX, &done));
    check_value(region, 1, 900 * KIB, 2);
    const struct rlimit none = {RLIM_INFINITY, RLIM_INFINITY};
    CHECK(setrlimit(RLIMIT_FSIZE, &none) == 0);
    CHECK(ndm_region_compact(region, UINT64_MAX, &done) == NDM_OK && done.moved_bytes == 900 * KIB);
    check_value(region, 1, 900 * KIB, 2);
    finish(region);
}

static void test_refused_move(void)
{
    unlink(path);
    unlink(slots_path);
    in_child(move_past_the_limit, NULL);
    group("a move that is refused");
}

static void no_descriptors(void *argument)
{
    (void)argument;
    for (rlim_t most = 3; most < 16; most++) {
        struct rlimit limit;
        CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
        limit.rlim_cur = most;
        CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
        ndm_region *region = ndm_region_open(path, &small);
        CHECK(region || ndm_last_error()->os_errno == EMFILE);
        ndm_region_destroy(region);
    }
    finish(ndm_region_open(path, &small));
}

/* An open that failed half way, or was killed there, bars nobody from the path. */
static void test_failed_opens(void)
{
    in_child(no_descriptors, NULL);
    finish(open_new(&small));
    refuse.allocate = ENOSPC; /* for the slot table */
    CHECK(!ndm_region_open(path, &small) && ndm_last_error()->os_errno == ENOSPC);
    ndm_region *region = ndm_region_open(path, &small);
    CHECK(region && store(region, 100, 1) == 0);
    finish(region);
    CHECK(truncate(path, 0) == 0 && truncate(slots_path, 0) == 0);
    region = ndm_region_open(path, &small);
    CHECK(region && info_of(region).capacity == 64 * KIB);
    finish(region);
    int fd = open(slots_path, O_WRONLY);
    CHECK(fd >= 0 && pwrite(fd, "somebody else's", 15, 0) == 15 && close(fd) == 0);
    CHECK(!ndm_region_open(path, &small) && ndm_last_error()->os_errno == EEXIST);
    group("an open that failed bars nobody");
}

static int lowest_descriptor(void)
{
    int fd = dup(0);
    close(fd);
    return fd;
}

int main(void)
{
    const int lowest = lowest_descriptor();
    CHECK(mkdtemp(directory));
    snprintf(path, sizeof path, "%s/region", directory);
    snprintf(slots_path, sizeof slots_path, "%s.slots", path);
    setvbuf(stdout, NULL, _IOLBF, 0);
    test_first_opens();
    test_values();
    test_views();
    test_reads_that_must_not_wait();
    test_space();
    test_arguments();
    test_threads();
    test_many_threads();
    test_fork();
    test_cut_short();
    test_refused_blocks();
    test_failed_punch();
    test_size_limit();
    test_refused_move();
    test_failed_opens();
    unlink(path);
    unlink(slots_path);
    CHECK(rmdir(directory) == 0);
    CHECK(lowest_descriptor() == lowest);
    return 0;
}
