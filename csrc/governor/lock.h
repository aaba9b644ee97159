/* The lock on the books, and how they begin anew: in a file that nobody uses, in a forked child. */
#ifndef NDM_GOVERNOR_LOCK_H
#define NDM_GOVERNOR_LOCK_H

#include "governor/governor.h"

/* Whoever changes more than slack and used is between these two. NDM_ERR_IO if the file's lock cannot be had: nothing is
 * locked then. ETIMEDOUT: the governor has no more patience. It repairs what a process that died inside has left. */
int ndm_i_books_lock(ndm_governor *governor);
void ndm_i_books_unlock(ndm_governor *governor);

/* Counters of nothing; what engines may have stays. Locked. */
void ndm_i_books_forget(ndm_i_books *books);

/* This process is a forked child whose governor is still its parent's: begin anew. With the threads' lock, or alone. */
void ndm_i_governor_renew(ndm_governor *governor);

#endif
