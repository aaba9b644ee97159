#define _GNU_SOURCE
#include "os/owner.h"

#include <pthread.h>
#include <stdatomic.h>
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

ndm_i_owner ndm_i_owner_here(void)
{
    if (ndm_i_this_thread == 0)
        ndm_i_this_thread = atomic_fetch_add(&next_thread, 1);
    return (ndm_i_owner){.thread = ndm_i_this_thread, .process = ndm_i_process()};
}
