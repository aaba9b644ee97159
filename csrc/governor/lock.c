/* The lock on the books. Threads of one governor exclude each other by a mutex. Processes do by a lock on the file's first
 * byte: the kernel drops it with the process, also when the machine goes down, and no owner's number has to be believed.
 * Two system calls are its price: who finds slack needs no lock.
 *
 * A process that is killed inside leaves `dirty` behind, and the next one in repairs. Its own row dies with it, whatever is
 * in there. What it may have left half done elsewhere is a sweep of another's cell: taken from slack, but not yet from what
 * is granted. The count of sweeps beside the slack tells. The totals are added up anew, and compared with what they may be. */
#define _GNU_SOURCE
#include "governor/lock.h"

#include "governor/number.h"
#include "governor/rows.h"
#include "os/locks.h"
#include "os/status.h"

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <time.h>

/* ---- anew ----------------------------------------------------------------------------------------------- */

void ndm_i_books_forget(ndm_i_books *books)
{
    books->granted = books->spillable = books->peak = 0;
    books->strict = books->dirty = books->waiting = 0;
    books->sweep.row = 0;
    memset(books->waiters, 0, sizeof books->waiters);
    for (uint32_t e = 0; e < NDM_I_ENGINES; e++) {
        ndm_i_engine *engine = &books->engine[e];
        engine->granted = engine->peak = engine->rejections = engine->waits = engine->reclaimed = 0;
    }
}

void ndm_i_governor_renew(ndm_governor *governor)
{
    governor->process = ndm_i_process();
    governor->epoch++;
    governor->outer = 0;
    governor->left = false;
    for (int i = 0; i <= NDM_I_ENGINES; i++)
        governor->levels[i] = 0;
    atomic_store(&governor->row, NULL);
    ndm_i_number_renew(governor);
    if (governor->shared) { /* a row is claimed when one is needed */
        if (governor->file.fd >= 0)
            ndm_i_file_reopen(&governor->file);
        return;
    }
    memset(governor->rows, 0, sizeof *governor->rows);
    ndm_i_books_forget(governor->books);
    ndm_i_row_claim(governor);
}

/* ---- repair --------------------------------------------------------------------------------------------- */

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

/* Waiters of this process that have left while somebody else had the lock. */
static void remove_left(ndm_governor *governor)
{
    ndm_i_books *books = governor->books;
    const ndm_i_row *row = atomic_load(&governor->row);
    for (uint32_t i = 0; row && i < NDM_I_WAITERS; i++) {
        ndm_i_waiter *waiter = &books->waiters[i];
        if (waiter->ticket != 0 && waiter->row == row - governor->rows && waiter->looked == 0) {
            waiter->ticket = 0;
            books->waiting--;
        }
    }
    ndm_i_books_settle(governor);
}

/* ---- the lock ------------------------------------------------------------------------------------------- */

/* With the threads' lock in a forked child that no handler saw, the mutex may be another thread's that is not here. */
static int threads_lock(ndm_governor *governor)
{
    if (!ndm_i_is_process(governor->process))
        pthread_mutex_init(&governor->lock, NULL);
    if (pthread_mutex_trylock(&governor->lock) != 0) {
        struct timespec end;
        clock_gettime(CLOCK_REALTIME, &end);
        end.tv_sec += (time_t)(governor->patience / UINT64_C(1000000000)) + 1;
        const int refused = pthread_mutex_timedlock(&governor->lock, &end);
        if (refused)
            return refused;
    }
    if (!ndm_i_is_process(governor->process))
        ndm_i_governor_renew(governor);
    return 0;
}

static int processes_lock(ndm_governor *governor)
{
    if (governor->file.fd < 0)
        return EBADF;
    const int refused = ndm_i_file_await_byte(&governor->file, 0, governor->patience);
    if (refused || !governor->books->dirty)
        return refused;
    finish_sweep(governor);
    ndm_i_books_recount(governor);
    ndm_i_books_settle(governor);
    governor->books->repairs++;
    return 0;
}

int ndm_i_books_lock(ndm_governor *governor)
{
    int refused = threads_lock(governor);
    if (refused == 0 && governor->shared && (refused = processes_lock(governor)) != 0)
        pthread_mutex_unlock(&governor->lock);
    if (refused)
        return ndm_i_fail_io(refused, refused == ETIMEDOUT ? "somebody keeps the lock on the governor's file: is it stopped?"
                                                           : "cannot lock the governor's file");
    governor->books->dirty = 1;
    if (atomic_exchange(&governor->left, false))
        remove_left(governor);
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
