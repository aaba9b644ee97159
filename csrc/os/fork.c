/* See fork.h. */
#define _GNU_SOURCE
#include "os/fork.h"

#include "os/owner.h"

#include <stdatomic.h>
#include <stddef.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of the list */
static ndm_i_fork_entry *first, *last;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static _Atomic uint64_t process; /* whose the lock is */

/* In a raw clone(), which ran no handlers, the lock may be held by a thread that is gone. */
static void take_lock(void)
{
    const uint64_t here = ndm_i_process();
    const uint64_t before = atomic_exchange(&process, here);
    if (before != here && before != 0)
        pthread_mutex_init(&lock, NULL);
    pthread_mutex_lock(&lock);
}

static void before_fork(void)
{
    pthread_mutex_lock(&lock);
    for (ndm_i_fork_entry *entry = last; entry; entry = entry->previous)
        if (entry->lock)
            pthread_mutex_lock(entry->lock);
}

static void in_parent(void)
{
    for (ndm_i_fork_entry *entry = first; entry; entry = entry->next)
        if (entry->lock)
            pthread_mutex_unlock(entry->lock);
    pthread_mutex_unlock(&lock);
}

/* The entries are the child's own copies from here on. One may remove itself. */
static void in_child(void)
{
    for (ndm_i_fork_entry *entry = first; entry; entry = entry->next)
        if (entry->lock)
            pthread_mutex_init(entry->lock, NULL);
    pthread_mutex_init(&lock, NULL);
    atomic_store(&process, ndm_i_process());
    for (ndm_i_fork_entry *entry = first, *next; entry; entry = next) {
        next = entry->next;
        entry->in_child(entry->context);
    }
}

static void register_handlers(void) { pthread_atfork(before_fork, in_parent, in_child); }

void ndm_i_fork_add(ndm_i_fork_entry *entry)
{
    pthread_once(&once, register_handlers);
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
