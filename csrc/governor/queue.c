/* Who waits for room, first come first served. A waiter is an entry of the books, so those of all threads and processes
 * stand in one line. Those behind count what those before them want as taken (reserve.c). */
#include "governor/reserve.h"

#include "governor/lock.h"
#include "governor/rows.h"
#include "os/bits.h"
#include "os/futex.h"
#include "os/patience.h"
#include "os/status.h"

#include <errno.h>

#define LONGEST_NAP UINT64_C(100000000) /* ns: a process that is killed wakes nobody */

/* The entry of a ticket of this governor's; ticket 0: an unused entry. */
static ndm_i_waiter *find(ndm_governor *governor, uint64_t ticket)
{
    ndm_i_books *books = governor->books;
    const ndm_i_row *row = atomic_load(&governor->row);
    for (uint32_t i = 0; row && i < NDM_I_WAITERS; i++)
        if (books->waiters[i].ticket == ticket && (ticket == 0 || books->waiters[i].row == row - governor->rows))
            return &books->waiters[i];
    return NULL;
}

static void remove_entry(ndm_governor *governor, ndm_i_waiter *waiter)
{
    waiter->ticket = 0;
    governor->books->waiting--;
    ndm_i_books_settle(governor);
    ndm_i_notify(governor); /* those behind it may fit now */
}

int64_t ndm_governor_queue(ndm_governor *governor, int64_t engine, uint64_t size)
{
    int status = ndm_i_check_call(governor, engine, size);
    if (status != NDM_OK || (status = ndm_i_books_lock(governor)) != NDM_OK)
        return status;
    ndm_i_books *books = governor->books;
    int64_t ticket = 0;
    status = ndm_i_can_ever_fit(governor, (uint32_t)engine, size);
    if ((status == NDM_ERR_BUDGET || status == NDM_ERR_CEILING) && atomic_load(&governor->row))
        atomic_load(&governor->row)->cells[engine].rejections++;
    if (status == NDM_OK && !atomic_load(&governor->row))
        status = ndm_i_row_claim(governor);
    ndm_i_waiter *waiter = status == NDM_OK ? find(governor, 0) : NULL;
    if (waiter) {
        ndm_i_row *row = atomic_load(&governor->row);
        waiter->size = size;
        waiter->looked = ndm_i_now();
        waiter->engine = (uint32_t)engine;
        waiter->row = (uint32_t)(row - governor->rows);
        waiter->ticket = ++books->next_ticket;
        ticket = (int64_t)waiter->ticket;
        books->waiting++;
        row->cells[engine].waits++;
    } else if (status == NDM_OK) {
        status = ndm_i_fail_io(EAGAIN, "as many wait as the governor has room for");
    }
    ndm_i_books_settle(governor);
    ndm_i_books_unlock(governor);
    return status == NDM_OK ? ticket : status;
}

/* One look. *seen is what the word was before it. */
static int try_again(ndm_governor *governor, uint64_t ticket, uint32_t *seen)
{
    int status = ndm_i_books_lock(governor);
    if (status != NDM_OK)
        return status;
    *seen = atomic_load(&governor->books->changes);
    ndm_i_waiter *waiter = find(governor, ticket);
    if (!waiter || waiter->engine >= NDM_I_ENGINES) {
        status = ndm_i_fail(NDM_ERR_ARGUMENT, "nobody waits with that ticket");
    } else {
        waiter->looked = ndm_i_now();
        if ((status = ndm_i_budget_take(governor, waiter->engine, waiter->size, ticket)) == NDM_OK)
            remove_entry(governor, waiter);
    }
    ndm_i_books_unlock(governor);
    return status;
}

int ndm_governor_wait(ndm_governor *governor, int64_t ticket, uint64_t timeout)
{
    int status = ndm_i_check_call(governor, 0, 0);
    if (status != NDM_OK)
        return status;
    if (ticket <= 0)
        return ndm_i_fail(NDM_ERR_ARGUMENT, "nobody waits with that ticket");
    const uint64_t start = ndm_i_now();
    for (;;) {
        uint32_t seen = 0;
        status = try_again(governor, (uint64_t)ticket, &seen);
        if ((status != NDM_ERR_BUDGET && status != NDM_ERR_CEILING) || timeout == 0)
            return status;
        const uint64_t passed = ndm_i_now() - start;
        if (passed >= timeout)
            return NDM_ERR_WAIT;
        if (!ndm_i_futex_wait(&governor->books->changes, seen, ndm_i_min(timeout - passed, LONGEST_NAP)))
            return NDM_ERR_WAIT; /* a signal */
    }
}

void ndm_governor_leave(ndm_governor *governor, int64_t ticket)
{
    if (!governor || ticket <= 0)
        return;
    if (ndm_i_books_lock(governor) != NDM_OK) { /* no entry of a living process changes but by itself */
        ndm_i_waiter *waiter = ndm_i_is_process(governor->process) ? find(governor, (uint64_t)ticket) : NULL;
        if (waiter) {
            waiter->looked = 0;
            governor->left = true;
        }
        return;
    }
    ndm_i_waiter *waiter = find(governor, (uint64_t)ticket);
    if (waiter && waiter->engine < NDM_I_ENGINES) {
        atomic_load(&governor->row)->cells[waiter->engine].rejections++;
        remove_entry(governor, waiter);
    }
    ndm_i_books_unlock(governor);
}

int64_t ndm_governor_changes(ndm_governor *governor, int64_t seen, uint64_t timeout)
{
    const int status = ndm_i_check_call(governor, 0, 0);
    if (status != NDM_OK)
        return status;
    const _Atomic uint32_t *changes = &governor->books->changes;
    if (seen == (int64_t)atomic_load(changes))
        ndm_i_futex_wait(changes, (uint32_t)seen, timeout);
    return (int64_t)atomic_load(changes);
}

/* ---- reclaim, across processes -------------------------------------------------------------------------- */

int ndm_governor_ask(ndm_governor *governor, int64_t engine, uint64_t size)
{
    int status = ndm_i_check_call(governor, engine < 0 ? 0 : engine, size);
    if (status != NDM_OK || (status = ndm_i_books_lock(governor)) != NDM_OK)
        return status;
    int asked = 0;
    const uint32_t first = engine < 0 ? 0 : (uint32_t)engine;
    const uint32_t end = engine < 0 ? ndm_i_known(governor->books) : first + 1;
    for (uint32_t i = 0; i < governor->count; i++) {
        ndm_i_row *row = &governor->rows[i];
        bool any = false;
        for (uint32_t e = first; e < end && row->claimed && row != atomic_load(&governor->row); e++)
            if (row->cells[e].used > 0) {
                ndm_i_raise(&row->cells[e].asked, size);
                any = true;
            }
        if (any)
            row->attention = 1;
        asked += any;
    }
    ndm_i_books_unlock(governor);
    return asked;
}

int ndm_governor_is_asked(const ndm_governor *governor)
{
    const ndm_i_row *row = governor ? atomic_load_explicit(&governor->row, memory_order_acquire) : NULL;
    return row && atomic_load_explicit(&row->attention, memory_order_relaxed) != 0 &&
           ndm_i_is_process(governor->process);
}

int64_t ndm_governor_asked(ndm_governor *governor, uint64_t *sizes)
{
    ndm_i_row *row = governor ? atomic_load(&governor->row) : NULL;
    int64_t engines = 0;
    if (!row || !ndm_i_is_process(governor->process) || atomic_exchange(&row->attention, 0) == 0)
        return 0;
    for (uint32_t e = 0; e < NDM_I_ENGINES; e++) {
        sizes[e] = atomic_exchange(&row->cells[e].asked, 0);
        engines += sizes[e] > 0;
    }
    return engines;
}

int ndm_governor_note_reclaimed(ndm_governor *governor, int64_t engine, uint64_t size)
{
    const int status = ndm_i_check_call(governor, engine, size);
    ndm_i_row *row = status == NDM_OK ? atomic_load(&governor->row) : NULL;
    if (row && ndm_i_is_process(governor->process))
        row->cells[engine].reclaimed += size;
    return status;
}
