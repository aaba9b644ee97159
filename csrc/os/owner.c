/* See owner.h. */
#define _GNU_SOURCE
#include "os/owner.h"

#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

/* Until the page exists, a word that equals no process number. */
static const volatile uint64_t nobody = 0;

_Thread_local uint64_t ndm_i_this_thread;
const volatile uint64_t *_Atomic ndm_i_process_word = &nobody;

static _Atomic uint64_t next_thread = 1;
static _Atomic uint64_t generation; /* copied by fork, unlike the page: a child's number differs from its parent's */
static _Atomic(_Atomic uint64_t *) page;

static void forget_process(void)
{
    _Atomic uint64_t *word = atomic_load(&page);
    if (word)
        atomic_store(word, 0);
}

static _Atomic uint64_t *make_page(void)
{
    size_t size = (size_t)sysconf(_SC_PAGESIZE);
    void *fresh = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fresh == MAP_FAILED)
        return NULL;
    /* Kernels without MADV_WIPEONFORK still get the fork() of the C library. So do emulators, which may accept the advice
     * without following it, as qemu's user mode does. */
    madvise(fresh, size, MADV_WIPEONFORK);
    if (pthread_atfork(NULL, NULL, forget_process) != 0)
        goto fail;
    _Atomic uint64_t *expected = NULL;
    if (!atomic_compare_exchange_strong(&page, &expected, (_Atomic uint64_t *)fresh)) {
        munmap(fresh, size);
        return expected; /* another thread was first */
    }
    return fresh;

fail:
    munmap(fresh, size);
    return NULL;
}

uint64_t ndm_i_process(void)
{
    _Atomic uint64_t *word = atomic_load(&page);
    if (!word && !(word = make_page()))
        return 0;
    /* Each caller sees to it: the thread that made the page may not have come so far, or not exist in this child. */
    atomic_store(&ndm_i_process_word, (const volatile uint64_t *)word);
    uint64_t seen = 0;
    if (atomic_load(word) == 0)
        atomic_compare_exchange_strong(word, &seen, atomic_fetch_add(&generation, 1) + 1);
    return atomic_load(word);
}

/* ---- threads -------------------------------------------------------------------------------------------- */

/* A thread that owns something, or did. */
struct ndm_i_thread {
    _Atomic bool ended;
    _Atomic unsigned users; /* the thread while it runs, and what it owns */
    int rounds;             /* of destructors that the thread has left */
};

static _Thread_local struct ndm_i_thread *this_record;
static pthread_key_t end_of_thread;
static bool has_key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void thread_unref(struct ndm_i_thread *thread)
{
    if (atomic_fetch_sub(&thread->users, 1) == 1)
        free(thread);
}

/* Other destructors of the thread may still use what it owns: this one comes in the last round but one. In the last,
 * sanitizers take down what they know of the thread. */
static void thread_ends(void *argument)
{
    struct ndm_i_thread *thread = argument;
    if (--thread->rounds > 0 && pthread_setspecific(end_of_thread, thread) == 0)
        return;
    atomic_store_explicit(&thread->ended, true, memory_order_release);
    this_record = NULL;
    thread_unref(thread);
}

static void make_key(void) { has_key = pthread_key_create(&end_of_thread, thread_ends) == 0; }

/* A program, or a plugin that holds this code, goes. A thread that ends later would call what is not there any more. */
__attribute__((destructor)) static void delete_key(void)
{
    if (has_key)
        pthread_key_delete(end_of_thread);
    has_key = false;
}

/* The calling thread, with one user more. NULL: no memory. */
static struct ndm_i_thread *thread_ref(void)
{
    pthread_once(&once, make_key);
    if (!this_record) {
        struct ndm_i_thread *thread = calloc(1, sizeof *thread);
        if (!thread)
            return NULL;
        atomic_init(&thread->users, 1);
        thread->rounds = PTHREAD_DESTRUCTOR_ITERATIONS - 1;
        if (!has_key || pthread_setspecific(end_of_thread, thread) != 0)
            thread->rounds = 0; /* nobody will hear of its end: what it owns can be adopted after a release only */
        this_record = thread;
    }
    if (ndm_i_this_thread == 0)
        ndm_i_this_thread = atomic_fetch_add(&next_thread, 1);
    atomic_fetch_add(&this_record->users, 1);
    return this_record;
}

/* ---- owners --------------------------------------------------------------------------------------------- */

bool ndm_i_owner_init(ndm_i_owner *owner)
{
    owner->process = ndm_i_process();
    owner->thread = owner->process != 0 ? thread_ref() : NULL;
    atomic_init(&owner->changing, false);
    atomic_init(&owner->holder, owner->thread ? ndm_i_this_thread : NDM_I_CLOSED);
    return owner->thread != NULL;
}

void ndm_i_owner_share(ndm_i_owner *owner)
{
    atomic_store_explicit(&owner->holder, NDM_I_SHARED, memory_order_release);
}

bool ndm_i_owner_close(ndm_i_owner *owner) { return atomic_exchange(&owner->holder, NDM_I_CLOSED) != NDM_I_CLOSED; }

void ndm_i_owner_fini(ndm_i_owner *owner)
{
    if (owner->thread && ndm_i_is_process(owner->process)) /* a child has no use for what its parent's threads count */
        thread_unref(owner->thread);
    owner->thread = NULL;
}

void ndm_i_owner_release(ndm_i_owner *owner)
{
    assert(ndm_i_owner_holder(owner) == ndm_i_this_thread && ndm_i_is_process(owner->process));
    atomic_store_explicit(&owner->holder, NDM_I_RELEASED, memory_order_release);
}

int ndm_i_owner_adopt(ndm_i_owner *owner)
{
    if (!ndm_i_is_process(owner->process) || atomic_exchange(&owner->changing, true))
        return EPERM;
    uint64_t holder = atomic_load_explicit(&owner->holder, memory_order_acquire);
    const bool ownerless = holder == NDM_I_RELEASED ||
                           (holder != NDM_I_CLOSED && atomic_load_explicit(&owner->thread->ended, memory_order_acquire));
    int refused = ownerless || holder == ndm_i_this_thread ? 0 : EPERM;
    struct ndm_i_thread *here = refused ? NULL : thread_ref();
    if (!refused && !here)
        refused = ENOMEM;
    if (here && !atomic_compare_exchange_strong(&owner->holder, &holder, ndm_i_this_thread))
        refused = EPERM; /* closed meanwhile */
    if (here)
        thread_unref(refused ? here : owner->thread);
    if (here && !refused)
        owner->thread = here;
    atomic_store(&owner->changing, false);
    return refused;
}
