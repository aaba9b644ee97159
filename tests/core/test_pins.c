/* Pins by themselves: counts, addresses that share an extent, orphans and their return, writable views, what may be unmapped,
 * views that end on other threads, a forked child, and a checker that finds what is planted. */
#define _GNU_SOURCE
#include "check.h"
#include "store/pins.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { LENGTH = 1 << 24 };

static _Atomic int ended; /* homes whose last user has left */
static int fd;

static void on_last(ndm_i_home *home)
{
    (void)home;
    atomic_fetch_add(&ended, 1);
}

static ndm_i_mapping *map(void)
{
    ndm_i_mapping *mapping = ndm_i_mapping_new(fd, LENGTH);
    CHECK(mapping);
    return mapping;
}

static void start(ndm_i_home *home)
{
    atomic_store(&ended, 0);
    CHECK(ndm_i_home_init(home, on_last));
    CHECK(!ndm_i_pins_any(home) && !ndm_i_pins_writable(home) && !ndm_i_pins_have_returned(home));
}

static bool all_sound(void *context, uint32_t extent, bool orphan)
{
    (void)context, (void)extent, (void)orphan;
    return true;
}

static uint64_t check(ndm_i_home *home) { return ndm_i_pins_check(home, all_sound, NULL); }

static void add(ndm_i_home *home, uint32_t extent, ndm_i_mapping *mapping, uint64_t offset, bool writable)
{
    CHECK(ndm_i_pins_add(home, extent, mapping, mapping->base + offset, 0, true, writable));
    CHECK(ndm_i_pins_any(home) && ndm_i_pins_pinned(home, extent) && check(home) == 0);
}

static void drop(ndm_i_mapping *mapping, uint64_t offset) { CHECK(ndm_i_pins_drop(mapping->base + offset, true)); }

static void test_counts(void)
{
    ndm_i_home home;
    ndm_i_mapping *mapping = map();
    start(&home);
    CHECK(!ndm_i_pins_pinned(&home, 3));
    for (int i = 0; i < 3; i++)
        add(&home, 3, mapping, 64, false);
    add(&home, 4, mapping, 128, false);
    CHECK(atomic_load(&home.users) == 3 && atomic_load(&mapping->users) == 3); /* one a view, however often it was given */
    CHECK(!ndm_i_pins_pinned(&home, 5));
    for (int i = 0; i < 3; i++) {
        CHECK(ndm_i_pins_pinned(&home, 3));
        drop(mapping, 64);
        CHECK(check(&home) == 0);
    }
    CHECK(!ndm_i_pins_pinned(&home, 3) && ndm_i_pins_pinned(&home, 4) && atomic_load(&home.users) == 2);
    drop(mapping, 64); /* not a view any more: nothing happens */
    drop(mapping, 192);
    CHECK(atomic_load(&home.users) == 2 && atomic_load(&mapping->users) == 2);
    ndm_i_home_leave(&home); /* the region goes; the view stays */
    CHECK(atomic_load(&ended) == 0);
    drop(mapping, 128);
    CHECK(atomic_load(&ended) == 1 && atomic_load(&mapping->users) == 1);
    ndm_i_mapping_unref(mapping);
}

/* Two addresses of one extent are one pin; the same extent of another home is another. */
static void test_shared(void)
{
    ndm_i_home home, other;
    ndm_i_mapping *old = map(), *fresh = map();
    start(&home);
    start(&other);
    add(&home, 7, old, 4096, false);
    add(&home, 7, fresh, 4096, false);
    add(&other, 7, fresh, 8192, false);
    CHECK(atomic_load(&home.users) == 2 && atomic_load(&other.users) == 2);
    drop(old, 4096);
    CHECK(ndm_i_pins_pinned(&home, 7) && atomic_load(&old->users) == 1 && atomic_load(&fresh->users) == 3);
    drop(fresh, 4096);
    CHECK(!ndm_i_pins_pinned(&home, 7) && ndm_i_pins_pinned(&other, 7));
    CHECK(check(&home) == 0 && check(&other) == 0);
    drop(fresh, 8192);
    ndm_i_home_leave(&home);
    ndm_i_home_leave(&other);
    CHECK(atomic_load(&ended) == 2);
    ndm_i_mapping_unref(old);
    ndm_i_mapping_unref(fresh);
}

static void test_orphans(void)
{
    ndm_i_home home;
    ndm_i_mapping *mapping = map();
    uint32_t extent = 99;
    start(&home);
    CHECK(!ndm_i_pins_orphan(&home, 1)); /* no view keeps it */
    for (uint32_t i = 1; i <= 3; i++)
        add(&home, i, mapping, 64 * i, false);
    add(&home, 1, mapping, 1024, false);
    CHECK(ndm_i_pins_orphan(&home, 1) && ndm_i_pins_orphan(&home, 3) && !ndm_i_pins_orphan(&home, 4));
    CHECK(!ndm_i_pins_collect(&home, &extent) && extent == 99);
    drop(mapping, 64);
    CHECK(!ndm_i_pins_have_returned(&home)); /* its other view lives */
    drop(mapping, 128);
    CHECK(!ndm_i_pins_have_returned(&home)); /* nobody freed that one */
    drop(mapping, 1024);
    CHECK(ndm_i_pins_have_returned(&home) && !ndm_i_pins_pinned(&home, 1) && check(&home) == 0);
    drop(mapping, 192);
    CHECK(ndm_i_pins_collect(&home, &extent) && extent == 3); /* last returned, first collected */
    add(&home, 3, mapping, 192, false);                      /* its number is free for another */
    CHECK(ndm_i_pins_collect(&home, &extent) && extent == 1);
    CHECK(!ndm_i_pins_collect(&home, &extent) && !ndm_i_pins_have_returned(&home));
    drop(mapping, 192);
    CHECK(!ndm_i_pins_have_returned(&home));
    ndm_i_home_leave(&home);
    CHECK(atomic_load(&ended) == 1);
    ndm_i_mapping_unref(mapping);
}

/* `writable` counts extents, and an extent stays writable until its last view ends. */
static void test_writable(void)
{
    ndm_i_home home;
    ndm_i_mapping *mapping = map();
    start(&home);
    add(&home, 1, mapping, 64, false);
    CHECK(!ndm_i_pins_writable(&home));
    add(&home, 1, mapping, 72, true);
    add(&home, 1, mapping, 80, true);
    add(&home, 2, mapping, 128, true);
    CHECK(ndm_i_pins_writable(&home) && atomic_load(&home.writable) == 2);
    drop(mapping, 72);
    drop(mapping, 80);
    CHECK(atomic_load(&home.writable) == 2);
    drop(mapping, 64);
    CHECK(atomic_load(&home.writable) == 1);
    drop(mapping, 128);
    CHECK(!ndm_i_pins_writable(&home) && check(&home) == 0);
    ndm_i_home_leave(&home);
    ndm_i_mapping_unref(mapping);
}

/* A view that may not unmap stays where it is the last of its pages, its mapping, or its region. */
static void test_may_unmap(void)
{
    ndm_i_home home;
    ndm_i_mapping *mapping = map(), *own = map();
    start(&home);
    add(&home, 1, mapping, 0, false);
    CHECK(ndm_i_pins_add(&home, 2, mapping, mapping->base + 65536, 65536, true, false));
    CHECK(ndm_i_pins_add(&home, 2, mapping, mapping->base + 65536, 65536, true, false));
    add(&home, 3, own, 0, false);
    ndm_i_mapping_unref(own); /* the view alone holds it */
    CHECK(ndm_i_pins_drop(mapping->base + 65536, false));
    CHECK(!ndm_i_pins_drop(mapping->base + 65536, false)); /* pages would go */
    CHECK(!ndm_i_pins_drop(own->base, false));             /* a mapping would */
    CHECK(ndm_i_pins_pinned(&home, 2) && ndm_i_pins_pinned(&home, 3) && check(&home) == 0);
    CHECK(ndm_i_pins_drop(own->base, true) && ndm_i_pins_drop(mapping->base + 65536, true));
    add(&home, 1, mapping, 64, false);
    ndm_i_home_leave(&home);
    CHECK(ndm_i_pins_drop(mapping->base, false)); /* another view of the extent is left */
    CHECK(!ndm_i_pins_drop(mapping->base + 64, false) && atomic_load(&ended) == 0); /* the region would go */
    CHECK(ndm_i_pins_drop(mapping->base + 64, true) && atomic_load(&ended) == 1);
    ndm_i_mapping_unref(mapping);
}

/* The pages leave the RSS with the last view at that address; so do those that its faults map besides, and no others. */
static void forget(bool wide)
{
    ndm_i_home home;
    const uint64_t window = wide ? NDM_I_HUGE : NDM_I_GRAIN;
    CHECK(ftruncate(fd, LENGTH) == 0);
    ndm_i_mapping *private = ndm_i_mapping_new(fd, LENGTH);
    CHECK(private);
    start(&home);
    /* Pages of a private mapping show it: what was stored to them is gone once they are forgotten. */
    CHECK(mmap(private->base, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
          private->base);
    memset(private->base, 7, LENGTH);
    for (int i = 0; i < 2; i++)
        CHECK(ndm_i_pins_add(&home, 1, private, private->base + 2 * window - 1, 2, wide, false));
    drop(private, 2 * window - 1);
    CHECK(private->base[window] == 7);
    drop(private, 2 * window - 1);
    for (uint64_t at = 0; at < LENGTH; at += window) { /* it lies in two of them */
        const uint8_t is = at == window || at == 2 * window ? 0 : 7;
        CHECK(private->base[at] == is && private->base[at + window - 1] == is);
    }
    /* Never past the end of the mapping. */
    CHECK(ndm_i_pins_add(&home, 1, private, private->base + LENGTH - 1, 1, wide, false));
    drop(private, LENGTH - 1);
    CHECK(private->base[LENGTH - window] == 0 && private->base[0] == 7);
    ndm_i_home_leave(&home);
    ndm_i_mapping_unref(private);
    CHECK(ftruncate(fd, 0) == 0);
}

static void test_forget(void)
{
    forget(false);
    forget(true);
}

/* More pins than the table has room for at first. */
static void test_many(void)
{
    enum { MANY = 5000 };
    ndm_i_home home;
    ndm_i_mapping *mapping = map();
    start(&home);
    for (uint32_t i = 0; i < MANY; i++)
        CHECK(ndm_i_pins_add(&home, i, mapping, mapping->base + i * 64, 0, true, i % 2));
    CHECK(atomic_load(&home.users) == MANY + 1 && atomic_load(&home.writable) == MANY / 2 && check(&home) == 0);
    for (uint32_t i = 0; i < MANY; i += 3)
        CHECK(ndm_i_pins_orphan(&home, i));
    for (uint32_t i = 0; i < MANY; i++) {
        const uint32_t which = i * 7 % MANY;
        CHECK(ndm_i_pins_pinned(&home, which));
        drop(mapping, which * 64);
    }
    uint32_t extent, count = 0;
    while (ndm_i_pins_collect(&home, &extent)) {
        CHECK(extent % 3 == 0);
        count++;
    }
    CHECK(count == (MANY + 2) / 3 && check(&home) == 0 && !ndm_i_pins_any(&home));
    ndm_i_home_leave(&home);
    ndm_i_mapping_unref(mapping);
}

/* ---- other threads -------------------------------------------------------------------------------------- */

enum { THREADS = 8, ROUNDS = 400, EACH = 4 };

/* A place where the owner leaves a view, and a thread takes it. */
static _Atomic(uint8_t *) handed[THREADS * EACH];
static _Atomic bool done;

static void *end_views(void *argument)
{
    const size_t first = *(const size_t *)argument * EACH;
    for (bool last = false;;) {
        bool any = false;
        for (size_t i = first; i < first + EACH; i++) {
            uint8_t *view = atomic_exchange(&handed[i], NULL);
            if (view && !ndm_i_pins_drop(view, false))
                CHECK(ndm_i_pins_drop(view, true));
            any = any || view;
        }
        if (last && !any)
            return NULL;
        last = atomic_load(&done);
    }
}

static void test_threads(void)
{
    static size_t numbers[THREADS];
    pthread_t threads[THREADS];
    ndm_i_home home;
    ndm_i_mapping *mapping = map();
    uint64_t orphaned = 0, collected = 0, handed_out = 0;
    uint32_t extent;
    start(&home);
    atomic_store(&done, false);
    for (size_t i = 0; i < THREADS; i++) {
        numbers[i] = i;
        CHECK(pthread_create(&threads[i], NULL, end_views, &numbers[i]) == 0);
    }
    for (uint32_t round = 0; round < ROUNDS; round++) {
        for (uint32_t i = 0; i < THREADS * EACH; i++) {
            /* Each view has an extent of its own, and every second one is freed while its view may live. */
            const uint32_t number = round * THREADS * EACH + i;
            uint8_t *view = mapping->base + (number % 20000) * 64;
            if (atomic_load(&handed[i]))
                continue;
            CHECK(ndm_i_pins_add(&home, number, mapping, view, 0, true, number % 5 == 0));
            atomic_store(&handed[i], view);
            handed_out++;
            orphaned += number % 2 && ndm_i_pins_orphan(&home, number);
        }
        while (ndm_i_pins_collect(&home, &extent)) {
            CHECK(extent % 2 == 1);
            collected++;
        }
        if (round % 40 == 0)
            CHECK(check(&home) == 0);
    }
    atomic_store(&done, true);
    for (size_t i = 0; i < THREADS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    while (ndm_i_pins_collect(&home, &extent))
        collected++;
    CHECK(handed_out >= THREADS * EACH && collected == orphaned);
    CHECK(!ndm_i_pins_any(&home) && !ndm_i_pins_writable(&home) && check(&home) == 0);
    CHECK(atomic_load(&mapping->users) == 1 && atomic_load(&ended) == 0);
    ndm_i_home_leave(&home);
    CHECK(atomic_load(&ended) == 1);
    ndm_i_mapping_unref(mapping);
}

/* The last user may leave anywhere, and is the last once. */
static void test_last(void)
{
    static size_t numbers[THREADS];
    pthread_t threads[THREADS];
    for (int round = 0; round < 20; round++) {
        ndm_i_home home;
        ndm_i_mapping *mapping = map();
        start(&home);
        atomic_store(&done, true);
        for (size_t i = 0; i < THREADS * EACH; i++) {
            CHECK(ndm_i_pins_add(&home, (uint32_t)i, mapping, mapping->base + i * 64, 0, true, false));
            atomic_store(&handed[i], mapping->base + i * 64);
        }
        for (size_t i = 0; i < THREADS; i++) {
            numbers[i] = i;
            CHECK(pthread_create(&threads[i], NULL, end_views, &numbers[i]) == 0);
        }
        ndm_i_home_leave(&home);
        for (size_t i = 0; i < THREADS; i++)
            CHECK(pthread_join(threads[i], NULL) == 0);
        CHECK(atomic_load(&ended) == 1 && atomic_load(&home.users) == 0);
        ndm_i_mapping_unref(mapping);
    }
}

/* ---- fork ----------------------------------------------------------------------------------------------- */

/* In a child the views that it inherited end as they do in the parent, which keeps its own; and the child may add more. It is
 * killed, for a leak check at its end would report what the parent has yet to free. */
static void test_fork(void)
{
    ndm_i_home home;
    ndm_i_mapping *mapping = map();
    int status, done_well[2];
    char byte = 0;
    start(&home);
    add(&home, 1, mapping, 0, false);
    CHECK(pipe(done_well) == 0);
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        ndm_i_home own;
        CHECK(atomic_load(&home.users) == 2 && ndm_i_pins_pinned(&home, 1));
        CHECK(ndm_i_pins_drop(mapping->base, true) && atomic_load(&home.users) == 1 && !ndm_i_pins_any(&home));
        CHECK(ndm_i_home_init(&own, on_last));
        CHECK(ndm_i_pins_add(&own, 1, mapping, mapping->base, 0, true, false) && ndm_i_pins_pinned(&own, 1));
        CHECK(check(&own) == 0);
        CHECK(ndm_i_pins_drop(mapping->base, true) && !ndm_i_pins_any(&own));
        CHECK(write(done_well[1], "x", 1) == 1);
        raise(SIGKILL);
    }
    close(done_well[1]);
    CHECK(waitpid(child, &status, 0) == child && read(done_well[0], &byte, 1) == 1 && byte == 'x');
    close(done_well[0]);
    CHECK(ndm_i_pins_pinned(&home, 1));
    drop(mapping, 0);
    ndm_i_home_leave(&home);
    CHECK(atomic_load(&ended) == 1);
    ndm_i_mapping_unref(mapping);
}

/* ---- the checker ---------------------------------------------------------------------------------------- */

static bool is_not(void *extent, uint32_t pinned, bool orphan) { return pinned != *(uint32_t *)extent && !orphan; }

static void test_damage(void)
{
    ndm_i_home home, other;
    ndm_i_mapping *mapping = map();
    uint32_t bad = 2, none = 9;
    start(&home);
    start(&other);
    add(&home, 1, mapping, 64, true);
    add(&home, 2, mapping, 128, false);
    add(&other, 3, mapping, 192, true);
    CHECK(ndm_i_pins_check(&home, is_not, &none) == 0);
    CHECK(ndm_i_pins_check(&home, is_not, &bad) == 1);
    bad = 3; /* of another home: not its affair */
    CHECK(ndm_i_pins_check(&home, is_not, &bad) == 0 && ndm_i_pins_check(&other, is_not, &bad) == 1);
    CHECK(ndm_i_pins_orphan(&home, 1) && ndm_i_pins_check(&home, is_not, &none) == 1);

    atomic_fetch_add(&home.writable, 1);
    CHECK(check(&home) == 1 && check(&other) == 0);
    atomic_fetch_sub(&home.writable, 2);
    CHECK(check(&home) == 1);
    atomic_fetch_add(&home.writable, 1);
    atomic_fetch_sub(&home.users, 1);
    CHECK(check(&home) == 1);
    atomic_fetch_add(&home.users, 1);
    CHECK(check(&home) == 0 && check(&other) == 0);
    drop(mapping, 64);
    drop(mapping, 128);
    drop(mapping, 192);
    uint32_t extent;
    CHECK(ndm_i_pins_collect(&home, &extent) && extent == 1);
    ndm_i_home_leave(&home);
    ndm_i_home_leave(&other);
    ndm_i_mapping_unref(mapping);
}

int main(void)
{
    fd = memfd_create("test_pins", MFD_CLOEXEC);
    CHECK(fd >= 0);
    test_counts();
    test_shared();
    test_orphans();
    test_writable();
    test_may_unmap();
    test_forget();
    test_many();
    test_threads();
    test_last();
    test_fork();
    test_damage();
    close(fd);
    puts("pins: counts, shared, orphans, writable, may_unmap, forget, many, threads, last, fork, damage: ok");
    return 0;
}
