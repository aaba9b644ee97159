/* Handles by themselves (test_handle.c has them with regions): numbers for any object, calls, retirement from another thread,
 * numbers that come again, and the last generation. */
#include "check.h"
#include "os/owner.h"
#include "store/handles.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/wait.h>
#include <unistd.h>

static void *const object = &(int){1};

/* A handle of the calling thread's, which gets a number by owning something. */
static uint64_t handle_of(void *thing)
{
    ndm_i_owner owner;
    CHECK(ndm_i_owner_init(&owner));
    const uint64_t handle = ndm_i_handle_new(thing, ndm_i_this_thread, owner.process);
    ndm_i_owner_fini(&owner);
    return handle;
}

static uint64_t new_handle(void)
{
    const uint64_t handle = handle_of(object);
    CHECK(handle != 0 && handle < (uint64_t)1 << 63);
    return handle;
}

static void expect_stale(uint64_t handle)
{
    ndm_i_call call = {.object = &call};
    CHECK(ndm_i_call_begin(handle, &call) == NDM_ERR_CLOSED && call.object == &call);
}

static void test_calls(void)
{
    const uint64_t handle = new_handle(), other = handle_of((void *)&handle);
    ndm_i_call call, inner;
    CHECK(other != 0 && other != handle);
    CHECK(ndm_i_call_begin(handle, &call) == NDM_OK && call.object == object);
    CHECK(ndm_i_call_begin(other, &inner) == NDM_OK && inner.object == &handle);
    CHECK(ndm_i_call_end(&inner) && ndm_i_call_end(&call));
    CHECK(ndm_i_call_begin(handle, &call) == NDM_OK && ndm_i_call_end(&call));
    CHECK(ndm_i_handle_retire(handle));
    expect_stale(handle);
    CHECK(ndm_i_call_begin(other, &call) == NDM_OK && call.object == &handle && ndm_i_call_end(&call));
    CHECK(ndm_i_handle_retire(other));
    expect_stale(other);
    expect_stale(0);
    expect_stale(UINT64_MAX);
    for (int bit = 0; bit < 64; bit++)
        expect_stale((uint64_t)1 << bit);
}

/* More than fit the first chunks of the table; all of them are different, and good at once. */
static void test_many(void)
{
    enum { MANY = 1000 };
    static uint64_t handles[MANY], again[MANY];
    for (int i = 0; i < MANY; i++) {
        handles[i] = handle_of(&handles[i]);
        CHECK(handles[i] != 0);
    }
    for (int i = 0; i < MANY; i++) {
        ndm_i_call call;
        CHECK(ndm_i_call_begin(handles[i], &call) == NDM_OK && call.object == &handles[i] && ndm_i_call_end(&call));
    }
    for (int i = 0; i < MANY; i++)
        CHECK(ndm_i_handle_retire(handles[i]));
    for (int i = 0; i < MANY; i++) /* the entries come again, last given first, each as another generation */
        again[i] = new_handle();
    for (int i = 0; i < MANY; i++) {
        expect_stale(handles[i]);
        CHECK((uint32_t)again[i] == (uint32_t)handles[MANY - 1 - i] && again[i] >> 32 == (handles[MANY - 1 - i] >> 32) + 1);
        CHECK(ndm_i_handle_retire(again[i]));
    }
}

/* ---- other threads -------------------------------------------------------------------------------------- */

static void *call_elsewhere(void *handle)
{
    ndm_i_call call;
    CHECK(ndm_i_call_begin(*(uint64_t *)handle, &call) == NDM_ERR_WRONG_THREAD);
    return NULL;
}

/* Gives the handle back if that worked, NULL if the owner is inside a call. */
static void *retire_elsewhere(void *handle) { return ndm_i_handle_retire(*(uint64_t *)handle) ? handle : NULL; }

static void *on_thread(void *(*body)(void *), uint64_t *handle)
{
    pthread_t thread;
    void *result;
    CHECK(pthread_create(&thread, NULL, body, handle) == 0 && pthread_join(thread, &result) == 0);
    return result;
}

/* A handle that is retired while its owner is inside a call stays until that ends; who ends it hears of that. */
static void test_doomed(void)
{
    uint64_t handle = new_handle();
    ndm_i_call call;
    on_thread(call_elsewhere, &handle);
    CHECK(ndm_i_call_begin(handle, &call) == NDM_OK);
    on_thread(call_elsewhere, &handle);
    CHECK(on_thread(retire_elsewhere, &handle) == NULL);
    CHECK(call.object == object && !ndm_i_call_end(&call));
    CHECK(ndm_i_handle_retire(handle)); /* what the owner does then */
    expect_stale(handle);
    handle = new_handle();
    CHECK(on_thread(retire_elsewhere, &handle) != NULL); /* outside of calls any thread may retire it */
    expect_stale(handle);
}

static _Atomic int closed;

/* Many owners at once, each with handles of its own, and one entry list between them. */
static void *own_some(void *unused)
{
    for (int i = 0; i < 3000; i++) {
        uint64_t handles[4];
        for (int k = 0; k < 4; k++) {
            handles[k] = handle_of(&handles[k]);
            CHECK(handles[k] != 0);
        }
        for (int k = 0; k < 4; k++) {
            ndm_i_call call;
            CHECK(ndm_i_call_begin(handles[k], &call) == NDM_OK && call.object == &handles[k] && ndm_i_call_end(&call));
            CHECK(ndm_i_handle_retire(handles[k]));
            CHECK(ndm_i_call_begin(handles[k], &call) == NDM_ERR_CLOSED);
            atomic_fetch_add(&closed, 1);
        }
    }
    return unused;
}

static void test_threads(void)
{
    enum { THREADS = 6 };
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_create(&threads[i], NULL, own_some, NULL) == 0);
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(atomic_load(&closed) == THREADS * 3000 * 4);
}

/* A forked child is not the owner. */
static void test_fork(void)
{
    const uint64_t handle = new_handle();
    int status;
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        ndm_i_call call;
        CHECK(ndm_i_call_begin(handle, &call) == NDM_ERR_WRONG_THREAD);
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(ndm_i_handle_retire(handle));
}

/* An entry whose generations are used up is not used again. Its state begins the entry: the generation, and two flags. */
static void test_last_generation(void)
{
    const uint64_t last = INT32_MAX;
    uint64_t handle = new_handle();
    ndm_i_call call;
    CHECK(ndm_i_call_begin(handle, &call) == NDM_OK && ndm_i_call_end(&call));
    _Atomic uint64_t *state = (_Atomic uint64_t *)call.entry;
    CHECK(atomic_load(state) >> 2 == handle >> 32);
    CHECK(ndm_i_handle_retire(handle));
    atomic_store(state, (last - 1) << 2);
    handle = new_handle(); /* the same entry: it was given back last */
    CHECK(handle >> 32 == last && ndm_i_call_begin(handle, &call) == NDM_OK && ndm_i_call_end(&call));
    CHECK((_Atomic uint64_t *)call.entry == state && ndm_i_handle_retire(handle));
    const uint64_t next = new_handle();
    CHECK((uint32_t)next != (uint32_t)handle);
    expect_stale(handle);
    CHECK(ndm_i_handle_retire(next));
}

int main(void)
{
    test_calls();
    test_many();
    test_doomed();
    test_threads();
    test_fork();
    test_last_generation();
    puts("handles: calls, many, doomed, threads, fork, last generation: ok");
    return 0;
}
