/* Handles: good while their region is, and harmless ever after.
 *
 * Prints a line a group; exits 1 at the first thing that is wrong. */
#include "check.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static const uint8_t hello[] = "hello";

static ndm_region *open_region(void)
{
    const ndm_options options = {
        .initial_capacity = 1 << 16, .max_capacity = 1 << 24, .alignment = 64, .cache_limit = UINT64_MAX};
    ndm_region *region = ndm_region_open_temporary("/var/tmp", &options);
    CHECK(region);
    return region;
}

static void all_give(uint64_t handle, int status)
{
    uint8_t buffer[8];
    CHECK(ndm_h_write(handle, hello, sizeof hello, 0) == status);
    CHECK(ndm_last_error()->status == status);
    CHECK(ndm_h_read_into(handle, 0, buffer, sizeof buffer) == status);
    CHECK(ndm_h_size(handle, 0) == status);
    CHECK(ndm_h_contains(handle, 0) == status);
    CHECK(ndm_h_free(handle, 0) == status);
    CHECK(!ndm_h_pin(handle, 0, NULL));
    CHECK(!ndm_h_region(handle));
    CHECK(ndm_last_error()->status == status);
}

static void test_verbs(void)
{
    ndm_region *region = open_region();
    const uint64_t handle = ndm_region_handle(region);
    CHECK(handle != 0 && handle < (uint64_t)1 << 63);
    CHECK(ndm_region_handle(region) == handle && ndm_h_region(handle) == region);
    CHECK(ndm_h_write(handle, hello, sizeof hello, 7) == 0);
    CHECK(ndm_h_write(handle, hello, 0, 7) == 1);
    CHECK(ndm_h_write(handle, hello, sizeof hello, 256) == NDM_ERR_ARGUMENT);
    CHECK(ndm_h_size(handle, 0) == sizeof hello && ndm_h_size(handle, 1) == 0);
    CHECK(ndm_h_size(handle, 2) == NDM_ERR_NO_SLOT);
    uint8_t buffer[sizeof hello];
    CHECK(ndm_h_read_into(handle, 0, buffer, sizeof buffer) == sizeof hello);
    CHECK(memcmp(buffer, hello, sizeof hello) == 0);
    uint64_t size = 0;
    const uint8_t *pinned = ndm_h_pin(handle, 0, &size);
    CHECK(pinned && size == sizeof hello && ndm_region_pin(region, 0, NULL) == pinned);
    CHECK(ndm_h_free(handle, 0) == NDM_OK && ndm_h_contains(handle, 0) == 0);
    CHECK(ndm_h_size(handle, 0) == NDM_ERR_FREED_SLOT);
    CHECK(ndm_h_write(handle, (const uint8_t *)"other", 6, 0) == 0); /* elsewhere: the old bytes are pinned */
    ndm_region_unpin(pinned);
    CHECK(memcmp(pinned, hello, sizeof hello) == 0);
    CHECK(ndm_region_check(region) == 0);
    CHECK(ndm_region_close(region) == NDM_OK);
    CHECK(memcmp(pinned, hello, sizeof hello) == 0);
    ndm_region_unpin(pinned);
    all_give(handle, NDM_ERR_CLOSED);
    CHECK(ndm_region_handle(region) == 0 && ndm_last_error()->status == NDM_ERR_CLOSED);
    ndm_region_destroy(region);
    all_give(handle, NDM_ERR_CLOSED);
}

static void test_stale(void)
{
    static uint64_t old[200];
    for (size_t i = 0; i < 200; i++) {
        ndm_region *region = open_region();
        old[i] = ndm_region_handle(region);
        for (size_t k = 0; k < i; k++)
            CHECK(old[k] != old[i]);
        ndm_region_destroy(region);
    }
    ndm_region *region = open_region();
    CHECK(ndm_region_handle(region) != 0);
    for (size_t i = 0; i < 200; i++)
        CHECK(ndm_h_write(old[i], hello, sizeof hello, 0) == NDM_ERR_CLOSED);
    uint64_t random = 88172645463325252;
    for (int i = 0; i < 1000000; i++) {
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        const uint64_t guess = i % 2 ? random : random >> 32 << 32 | (random & 255);
        CHECK(guess == ndm_region_handle(region) || ndm_h_size(guess, 0) == NDM_ERR_CLOSED);
    }
    ndm_region_destroy(region);
    for (uint64_t bit = 0; bit < 64; bit++)
        all_give((uint64_t)1 << bit, NDM_ERR_CLOSED);
    all_give(0, NDM_ERR_CLOSED);
    all_give(UINT64_MAX, NDM_ERR_CLOSED);
}

static void test_many(void)
{
    enum { COUNT = 200 };
    static ndm_region *regions[COUNT];
    static uint64_t handles[COUNT];
    for (size_t i = 0; i < COUNT; i++) {
        regions[i] = open_region();
        handles[i] = ndm_region_handle(regions[i]);
        CHECK(ndm_h_write(handles[i], (const uint8_t *)&i, sizeof i, 0) == 0);
    }
    for (size_t i = 0; i < COUNT; i++) {
        size_t value;
        CHECK(ndm_h_read_into(handles[i], 0, (uint8_t *)&value, sizeof value) == sizeof value && value == i);
    }
    for (size_t i = 0; i < COUNT; i++)
        ndm_region_destroy(regions[i]);
    for (size_t i = 0; i < COUNT; i++)
        CHECK(ndm_h_size(handles[i], 0) == NDM_ERR_CLOSED);
}

static void *intrude(void *argument)
{
    all_give(*(uint64_t *)argument, NDM_ERR_WRONG_THREAD);
    return NULL;
}

static void test_owner(void)
{
    ndm_region *region = open_region();
    uint64_t handle = ndm_region_handle(region);
    pthread_t thread;
    CHECK(ndm_h_write(handle, hello, sizeof hello, 0) == 0);
    CHECK(pthread_create(&thread, NULL, intrude, &handle) == 0 && pthread_join(thread, NULL) == 0);
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        all_give(handle, NDM_ERR_WRONG_THREAD);
        ndm_region *own = open_region(); /* the table that the child inherits still works */
        const uint64_t new = ndm_region_handle(own);
        CHECK(ndm_h_write(new, hello, sizeof hello, 0) == 0);
        ndm_region_destroy(own);
        all_give(new, NDM_ERR_CLOSED);
        ndm_region_destroy(region);
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(ndm_h_contains(handle, 0) == 1);
    ndm_region_destroy(region);
}

struct race {
    _Atomic(ndm_region *) region;
    _Atomic uint64_t handle;
    _Atomic int writes;
};

static void *write_until_closed(void *argument)
{
    struct race *race = argument;
    ndm_region *region = open_region();
    const uint64_t handle = ndm_region_handle(region);
    atomic_store(&race->handle, handle);
    atomic_store(&race->region, region);
    for (;;) {
        const int64_t slot = ndm_h_write(handle, hello, sizeof hello, 0);
        if (slot < 0) {
            CHECK(slot == NDM_ERR_CLOSED);
            all_give(handle, NDM_ERR_CLOSED);
            return NULL;
        }
        atomic_fetch_add(&race->writes, 1);
        const uint8_t *pinned = ndm_h_pin(handle, slot, NULL);
        CHECK(pinned ? memcmp(pinned, hello, sizeof hello) == 0 : ndm_last_error()->status == NDM_ERR_CLOSED);
        ndm_region_unpin(pinned);
    }
}

/* Another thread destroys the region at any point of the owner's calls. */
static void test_race(void)
{
    for (int round = 0; round < 150; round++) {
        struct race race = {0};
        pthread_t owner;
        CHECK(pthread_create(&owner, NULL, write_until_closed, &race) == 0);
        while (!atomic_load(&race.region) || atomic_load(&race.writes) < round % 7)
            sched_yield();
        all_give(atomic_load(&race.handle), NDM_ERR_WRONG_THREAD);
        ndm_region_destroy(atomic_load(&race.region));
        CHECK(pthread_join(owner, NULL) == 0);
    }
}

static void *open_and_close(void *unused)
{
    for (int i = 0; i < 100; i++) {
        ndm_region *region = open_region();
        const uint64_t handle = ndm_region_handle(region);
        CHECK(ndm_h_region(handle) == region);
        ndm_region_destroy(region);
        CHECK(ndm_h_size(handle, 0) == NDM_ERR_CLOSED);
    }
    return unused;
}

static void test_threads(void)
{
    pthread_t threads[4];
    for (size_t i = 0; i < 4; i++)
        CHECK(pthread_create(&threads[i], NULL, open_and_close, NULL) == 0);
    for (size_t i = 0; i < 4; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
}

static void test_version(void)
{
    CHECK(strcmp(ndm_version(), NDM_VERSION) == 0 && ndm_abi_version() == NDM_ABI_VERSION && NDM_CHECK_ABI() == NDM_OK);
    CHECK(ndm_check_abi(NDM_ABI_VERSION + 1, NDM_VERSION_NUMBER) == NDM_ERR_VERSION);
    CHECK(ndm_last_error()->status == NDM_ERR_VERSION && strstr(ndm_last_error()->message, "ABI"));
    CHECK(ndm_check_abi(NDM_ABI_VERSION, NDM_VERSION_NUMBER + 1) == NDM_ERR_VERSION);
    CHECK(ndm_check_abi(NDM_ABI_VERSION, NDM_VERSION_NUMBER - 1) == NDM_OK);
}

int main(void)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } cases[] = {
        {"every verb works by handle, and pins outlive free and close", test_verbs},
        {"old handles and numbers that are none give NDM_ERR_CLOSED", test_stale},
        {"many regions have handles at a time", test_many},
        {"threads and children that are not the owner are told so", test_owner},
        {"a region destroyed while its owner writes by handle", test_race},
        {"threads take and give handles at the same time", test_threads},
        {"versions", test_version},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        cases[i].run();
        printf("ok  %s\n", cases[i].name);
    }
    return 0;
}
