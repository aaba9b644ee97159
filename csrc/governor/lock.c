/* The lock on the books. Threads of one governor exclude each other by a mutex. Processes do by a lock on the file's first
 * byte: the kernel drops it with the process, also when the machine goes down, and no owner's number has to be believed.
 * Two system calls are its price: who finds slack needs no lock.
 *
 * A process that is killed inside leaves `dirty` behind, and the next one in repairs. Its own row dies with it, whatever is
 * in there. What it may have left half done elsewhere is a sweep of another's cell: taken from slack, but not yet from what
 * is granted. The count of sweeps beside the slack tells. The totals are added up anew. */
#include "governor/lock.h"

#include "os/locks.h"
#include "os/status.h"

#include <assert.h>
#include <errno.h>

void ndm_i_books_recount(ndm_governor *governor)
{
    ndm_i_books *books = governor->books;
    uint64_t granted[NDM_I_ENGINES] = {0}, all = 0, spillable = 0;
    for (uint32_t i = 0; i < governor->count; i++)
        for (uint32_t e = 0; governor->rows[i].claimed && e < NDM_I_ENGINES; e++)
            granted[e] += governor->rows[i].cells[e].granted;
    for (uint32_t e = 0; e < NDM_I_ENGINES; e++) {
        books->engine[e].granted = granted[e];
        all += granted[e];
        spillable += books->engine[e].state & NDM_I_SPILLABLE ? granted[e] : 0;
    }
    books->granted = all;
    books->spillable = spillable;
    books->waiting = 0;
    for (uint32_t i = 0; i < NDM_I_WAITERS; i++)
        books->waiting += books->waiters[i].ticket != 0;
}

/* The sweep that was being made is made whole, or was not begun. */
static void finish_sweep(ndm_governor *governor)
{
    ndm_i_books *books = governor->books;
    const uint32_t row = books->sweep.row, engine = books->sweep.engine;
    if (row >= 1 && row <= governor->count && engine < NDM_I_ENGINES) {
        ndm_i_cell *cell = &governor->rows[row - 1].cells[engine];
        if (cell->slack >> NDM_I_SLACK_BITS != books->sweep.count)
            cell->granted = books->sweep.granted - books->sweep.taken;
    }
    books->sweep.row = 0;
}

/* With the threads' lock in a forked child that no handler saw, the mutex may be another thread's that is not here. */
static void threads_lock(ndm_governor *governor)
{
    if (!ndm_i_is_process(governor->process))
        pthread_mutex_init(&governor->lock, NULL);
    pthread_mutex_lock(&governor->lock);
    if (!ndm_i_is_process(governor->process))
        ndm_i_governor_renew(governor);
}

int ndm_i_books_lock(ndm_governor *governor)
{
    threads_lock(governor);
    if (governor->shared) {
        const int refused = governor->file.fd >= 0 ? ndm_i_file_await_byte(&governor->file, 0) : EBADF;
        if (refused) {
            pthread_mutex_unlock(&governor->lock);
            return ndm_i_fail_io(refused, "cannot lock the governor's file");
        }
        if (governor->books->dirty) {
            finish_sweep(governor);
            ndm_i_books_recount(governor);
            governor->books->repairs++;
        }
    }
    governor->books->dirty = 1;
    return NDM_OK;
}

void ndm_i_books_unlock(ndm_governor *governor)
{
    assert(governor->books->dirty);
    governor->books->dirty = 0;
    if (governor->shared)
        ndm_i_file_lock_byte(&governor->file, 0, false);
    pthread_mutex_unlock(&governor->lock);
}
