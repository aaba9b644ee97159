/* What a forked child lets go of. Descriptors, locks and mappings are inherited, and whoever holds a copy holds the file: a
 * child that lives on would keep a closed region's lock and its disk space. So each thing that is open is listed here, and
 * the child lets go of its copies before fork() returns there.
 *
 * Another thread may be at work while one forks, and the child has the copy of what that thread had half done. So who
 * opens a descriptor, a mapping, or a use of one, and notes it, or ends it and notes that, bars forks meanwhile: in a child
 * every ndm_i_file that is listed tells the truth, and so does every count of users. Things are listed before the first of
 * their descriptors is opened, and taken off the list after the last was closed.
 *
 * Locks are taken in this order: those of verbs (a reader's, a writer's), the bar, that of the list, those of its entries.
 * Nobody who bars forks waits for another thread, but for these locks. The bar is for system calls: no verb on a value in RAM
 * takes it.
 *
 * A signal handler may fork while its own thread bars forks. Then nothing is locked, and the child lets go of nothing.
 *
 * This rests on the handlers of the C library's fork(). A raw clone() runs none: such a child keeps its copies until it
 * ends, or runs another program.
 */
#ifndef NDM_FORK_H
#define NDM_FORK_H

#include <pthread.h>
#include <stdbool.h>

typedef struct ndm_i_fork_entry {
    void (*in_child)(void *context); /* in the order in which they were added; only the forking thread is there */
    void *context;
    pthread_mutex_t *lock; /* held across the fork, free in the child; or NULL. Nobody who holds it adds, removes, or bars */
    struct ndm_i_fork_entry *previous, *next;
} ndm_i_fork_entry;

/* List the entry; it stays where it is until removed. Any thread. */
void ndm_i_fork_add(ndm_i_fork_entry *entry);
void ndm_i_fork_remove(ndm_i_fork_entry *entry); /* of one that is not listed: does nothing */

/* No thread of this process forks until as many let()s have come, on the same thread; many threads may bar at once. */
void ndm_i_fork_bar(void);
void ndm_i_fork_let(void);

#endif
