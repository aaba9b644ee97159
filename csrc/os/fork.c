/* See fork.h. */
#define _GNU_SOURCE
#include "os/fork.h"

#include "os/owner.h"

#include <assert.h>
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>

/* Who forks comes before those that bar from then on: it would wait for ever where threads map and unmap all the time. */
#if defined(PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP)
#define NEW_BAR PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP
#else
#define NEW_BAR PTHREAD_RWLOCK_INITIALIZER
#endif

static pthread_rwlock_t bar = NEW_BAR;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of the list */
static ndm_i_fork_entry *first, *last;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static _Atomic uint64_t process; /* whose the locks are */

static _Thread_local unsigned depth; /* of the calling thread's bars */
static _Thread_local bool forking;   /* the calling thread holds all locks, and is about to fork */

static void renew_locks(void)
{
    bar = (pthread_rwlock_t)NEW_BAR;
    pthread_mutex_init(&lock, NULL);
}

/* In a child that ran no handlers the locks may be held by a thread that is gone. */
static void see_to_locks(void)
{
    const uint64_t here = ndm_i_process();
    if (atomic_load(&process) == here)
        return;
    const uint64_t before = atomic_exchange(&process, here);
    if (before != here && before != 0)
        renew_locks();
}

static void before_fork(void)
{
    if (depth > 0) /* in a signal handler */
        return;
    see_to_locks();
    pthread_rwlock_wrlock(&bar);
    pthread_mutex_lock(&lock);
    for (ndm_i_fork_entry *entry = last; entry; entry = entry->previous)
        if (entry->lock)
            pthread_mutex_lock(entry->lock);
    forking = true;
}

static void in_parent(void)
{
    if (!forking)
        return;
    forking = false;
    for (ndm_i_fork_entry *entry = first; entry; entry = entry->next)
        if (entry->lock)
            pthread_mutex_unlock(entry->lock);
    pthread_mutex_unlock(&lock);
    pthread_rwlock_unlock(&bar);
}

/* The entries are the child's own copies from here on. One may remove itself. */
static void in_child(void)
{
    if (!forking)
        return;
    forking = false;
    for (ndm_i_fork_entry *entry = first; entry; entry = entry->next)
        if (entry->lock)
            pthread_mutex_init(entry->lock, NULL);
    renew_locks();
    atomic_store(&process, ndm_i_process());
    for (ndm_i_fork_entry *entry = first, *next; entry; entry = next) {
        next = entry->next;
        entry->in_child(entry->context);
    }
}

/* The process is numbered anew before the child asks whose it is: by a handler that comes first. */
static void register_handlers(void)
{
    ndm_i_process();
    pthread_atfork(before_fork, in_parent, in_child);
}

static void take_lock(void)
{
    pthread_once(&once, register_handlers);
    see_to_locks();
    pthread_mutex_lock(&lock);
}

void ndm_i_fork_add(ndm_i_fork_entry *entry)
{
    take_lock();
    entry->previous = last;
    entry->next = NULL;
    if (last)
        last->next = entry;
    else
        first = entry;
    last = entry;
    pthread_mutex_unlock(&lock);
}

void ndm_i_fork_remove(ndm_i_fork_entry *entry)
{
    take_lock();
    if (entry->previous || first == entry) {
        *(entry->previous ? &entry->previous->next : &first) = entry->next;
        *(entry->next ? &entry->next->previous : &last) = entry->previous;
        entry->previous = entry->next = NULL;
    }
    pthread_mutex_unlock(&lock);
}

/* The depth is known before the lock is held, and until it is not: whatever a signal interrupts, the handler sees it. */
void ndm_i_fork_bar(void)
{
    if (depth++ > 0)
        return;
    const int saved = errno;
    pthread_once(&once, register_handlers); /* never with the bar: the C library may hold a lock of its own */
    see_to_locks();
    pthread_rwlock_rdlock(&bar);
    errno = saved;
}

void ndm_i_fork_let(void)
{
    assert(depth > 0);
    if (depth == 1) {
        const int saved = errno;
        pthread_rwlock_unlock(&bar);
        errno = saved;
    }
    depth--;
}
