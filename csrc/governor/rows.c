/* See rows.h. */
#include "governor/rows.h"

#include "governor/lock.h"
#include "os/bits.h"
#include "os/futex.h"
#include "os/locks.h"
#include "os/status.h"

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <unistd.h>

/* ---- totals --------------------------------------------------------------------------------------------- */

static void add(ndm_i_books *books, uint32_t engine, uint64_t size)
{
    books->engine[engine].granted += size;
    books->granted += size;
    if (books->engine[engine].state & NDM_I_SPILLABLE)
        books->spillable += size;
}

static void subtract(ndm_i_books *books, uint32_t engine, uint64_t size)
{
    assert(books->engine[engine].granted >= size && books->granted >= size);
    books->engine[engine].granted -= size;
    books->granted -= size;
    if (books->engine[engine].state & NDM_I_SPILLABLE)
        books->spillable -= size;
}

void ndm_i_grant(ndm_governor *governor, ndm_i_row *row, uint32_t engine, uint64_t size)
{
    add(governor->books, engine, size);
    row->cells[engine].granted += size;
}

void ndm_i_ungrant(ndm_governor *governor, ndm_i_row *row, uint32_t engine, uint64_t size)
{
    assert(row->cells[engine].granted >= size);
    row->cells[engine].granted -= size;
    subtract(governor->books, engine, size);
}

/* ---- sweeps --------------------------------------------------------------------------------------------- */

uint64_t ndm_i_sweep(ndm_governor *governor, ndm_i_row *row, uint32_t engine, uint64_t leave)
{
    ndm_i_books *books = governor->books;
    ndm_i_cell *cell = &row->cells[engine];
    uint64_t word = cell->slack, taken;
    do {
        if ((word & NDM_I_SLACK_MASK) <= leave)
            return 0;
        taken = (word & NDM_I_SLACK_MASK) - leave;
        books->sweep.row = 0; /* none, while what follows is written */
        books->sweep.engine = engine;
        books->sweep.taken = taken;
        books->sweep.granted = cell->granted;
        books->sweep.count = word >> NDM_I_SLACK_BITS;
        books->sweep.row = (uint32_t)(row - governor->rows) + 1;
    } while (!atomic_compare_exchange_weak(&cell->slack, &word, word - taken + (NDM_I_SLACK_MASK + 1)));
    cell->granted -= taken;
    books->sweep.row = 0;
    subtract(books, engine, taken);
    return taken;
}

uint64_t ndm_i_sweep_all(ndm_governor *governor, uint32_t engine)
{
    const uint32_t first = engine == NDM_I_EVERY_ENGINE ? 0 : engine;
    const uint32_t end = engine == NDM_I_EVERY_ENGINE ? governor->books->known : engine + 1;
    uint64_t taken = 0;
    for (uint32_t i = 0; i < governor->count; i++)
        for (uint32_t e = first; governor->rows[i].claimed && e < end; e++)
            taken += ndm_i_sweep(governor, &governor->rows[i], e, 0);
    return taken;
}

/* ---- the state of all ----------------------------------------------------------------------------------- */

static bool is_over(const ndm_i_books *books)
{
    if (books->granted > books->ceiling || books->spillable > books->ceiling - ndm_i_min(books->headroom, books->ceiling))
        return true;
    for (uint32_t e = 0; e < books->known; e++)
        if (books->engine[e].granted > books->engine[e].limit)
            return true;
    return false;
}

void ndm_i_books_settle(ndm_governor *governor)
{
    ndm_i_books *books = governor->books;
    const uint32_t waiting = books->waiting ? NDM_I_WAITING : 0;
    if (!is_over(books)) {
        books->strict = waiting;
        return;
    }
    books->strict = waiting | NDM_I_OVER; /* before the sweep: who adds to slack afterwards sees it */
    ndm_i_sweep_all(governor, NDM_I_EVERY_ENGINE);
    if (!is_over(books))
        books->strict = waiting;
}

void ndm_i_notify(ndm_governor *governor)
{
    if (governor->books->waiting == 0)
        return;
    governor->books->changes++;
    ndm_i_futex_wake(&governor->books->changes);
}

/* ---- claims --------------------------------------------------------------------------------------------- */

/* Give back all that a row has; its claim is over. Its counts of events go to the engines. */
static void vacate(ndm_governor *governor, ndm_i_row *row)
{
    ndm_i_books *books = governor->books;
    for (uint32_t e = 0; e < NDM_I_ENGINES; e++) {
        ndm_i_cell *cell = &row->cells[e];
        books->engine[e].rejections += cell->rejections;
        books->engine[e].waits += cell->waits;
        books->engine[e].reclaimed += cell->reclaimed;
        books->engine[e].peak = ndm_i_max(books->engine[e].peak, cell->peak);
    }
    books->peak = ndm_i_max(books->peak, row->peak);
    const uint32_t number = (uint32_t)(row - governor->rows);
    for (uint32_t i = 0; i < NDM_I_WAITERS; i++)
        if (books->waiters[i].ticket != 0 && books->waiters[i].row == number)
            books->waiters[i].ticket = 0;
    row->claimed = 0;
    memset(row, 0, sizeof *row);
    ndm_i_books_recount(governor);
}

int ndm_i_row_claim(ndm_governor *governor)
{
    assert(!atomic_load(&governor->row));
    for (uint32_t i = 0; i < governor->count; i++) {
        ndm_i_row *row = &governor->rows[i];
        if (governor->shared && !ndm_i_file_lock_byte(&governor->file, ndm_i_claim_byte(i), true))
            continue;
        if (row->claimed)
            vacate(governor, row); /* whoever had it is gone */
        memset(row, 0, sizeof *row);
        row->pid = (uint64_t)getpid();
        row->claimed = 1;
        atomic_store(&governor->row, row);
        return NDM_OK;
    }
    return ndm_i_fail_io(EAGAIN, "as many processes use the governor's file as it has room for");
}

uint32_t ndm_i_rows_reap(ndm_governor *governor)
{
    const ndm_i_row *mine = atomic_load(&governor->row);
    uint32_t found = 0;
    for (uint32_t i = 0; governor->shared && i < governor->count; i++) {
        ndm_i_row *row = &governor->rows[i];
        if (row == mine || !row->claimed || !ndm_i_file_lock_byte(&governor->file, ndm_i_claim_byte(i), true))
            continue;
        vacate(governor, row);
        ndm_i_file_lock_byte(&governor->file, ndm_i_claim_byte(i), false);
        found++;
    }
    if (found > 0) {
        ndm_i_books_settle(governor);
        ndm_i_notify(governor);
    }
    return found;
}

void ndm_i_row_leave(ndm_governor *governor)
{
    ndm_i_row *row = atomic_load(&governor->row);
    if (!row)
        return;
    atomic_store(&governor->row, NULL);
    vacate(governor, row);
    if (governor->shared)
        ndm_i_file_lock_byte(&governor->file, ndm_i_claim_byte((uint32_t)(row - governor->rows)), false);
    ndm_i_books_settle(governor);
    ndm_i_notify(governor);
}
