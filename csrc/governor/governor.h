/* The governor of one process: the way to its books. */
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
    uint64_t patience;       /* how long (ns) somebody else may have the lock */
    ndm_i_fork_entry fork;
    _Atomic uint32_t outer;  /* what is real, in per cent of what may be: the watch's */
    _Atomic uint32_t levels[NDM_I_ENGINES + 1]; /* of pressure, as last found; the last is that of all */
    _Atomic uint64_t handle;
    _Atomic bool left;       /* a waiter has left without the lock */
};

#endif
