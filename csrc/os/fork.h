/* What a forked child lets go of. Descriptors, locks and mappings are inherited, and whoever holds a copy holds the file: a
 * child that lives on would keep a closed region's lock and its disk space. So each thing that is open is listed here, and
 * the child lets go of its copies before fork() returns there.
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
    pthread_mutex_t *lock; /* held across the fork, free in the child; or NULL. Nobody who holds it adds or removes */
    struct ndm_i_fork_entry *previous, *next;
} ndm_i_fork_entry;

/* List the entry; it stays where it is until removed. Any thread. */
void ndm_i_fork_add(ndm_i_fork_entry *entry);
void ndm_i_fork_remove(ndm_i_fork_entry *entry); /* of one that is not listed: does nothing */

#endif
