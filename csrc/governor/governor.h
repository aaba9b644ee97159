/* The governor of one process: the way to its books, and the lock on them (lock.c). */
#ifndef NDM_GOVERNOR_H
#define NDM_GOVERNOR_H

#include "governor/books.h"
#include "os/file.h"
#include "os/fork.h"
#include "os/owner.h"

#include "nodedb_mem.h"

#include <pthread.h>

struct ndm_governor {
    ndm_i_books *books;
    ndm_i_row *rows;         /* as many as `count` */
    _Atomic(ndm_i_row *) row; /* this claim's; NULL: it has none yet */
    uint32_t count;
    bool shared, broken;
    uint64_t process;        /* whose it is: a forked child finds another number here than its own, and starts anew */
    _Atomic uint64_t epoch;  /* grows with that */
    ndm_i_file file;         /* of shared books */
    pthread_mutex_t lock;    /* the threads'; the processes' is byte 0 of the file */
    ndm_i_fork_entry fork;
    _Atomic uint32_t outer;  /* what is real, in per cent of what may be: the watch's */
    _Atomic uint32_t levels[NDM_I_ENGINES + 1]; /* of pressure, as last found; the last is that of all */
    _Atomic uint64_t handle;
};

/* Whoever changes more than slack and used is between these two. NDM_ERR_IO if the file's lock cannot be had: nothing is
 * locked then. It repairs what a process that died inside has left. */
int ndm_i_books_lock(ndm_governor *governor);
void ndm_i_books_unlock(ndm_governor *governor);

/* This process is a forked child whose governor is still its parent's: begin anew. With the threads' lock, or alone. */
void ndm_i_governor_renew(ndm_governor *governor);

#endif
