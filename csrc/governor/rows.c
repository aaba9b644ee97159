/* See rows.h. */
#include "governor/rows.h"

#include "os/bits.h"
#include "os/futex.h"
#include "os/locks.h"
#include "os/status.h"

#include <assert.h>
#include <errno.h>
#include <unistd.h>

/* ---- totals --------------------------------------------------------------------------------------------- */

uint64_t ndm_i_used(const ndm_governor *governor, uint32_t engine)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < governor->count; i++)
        if (atomic_load_explicit(&governor->rows[i].claimed, memory_order_acquire))
            sum += atomic_load_explicit(&governor->rows[i].cells[engine].used, memory_order_relaxed);
    return sum;
}

uint64_t ndm_i_used_by_all(const ndm_governor *governor)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < governor->count; i++)
        if (atomic_load_explicit(&governor->rows[i].claimed, memory_order_acquire))
            sum += atomic_load_explicit(&governor->rows[i].used, memory_order_relaxed);
    return sum;
}

void ndm_i_note_peaks(ndm_governor *governor, uint32_t engine)
{
    if (!governor->shared)
        return; /* its only row knows */
    ndm_i_raise(&governor->books->engine[engine].peak, ndm_i_used(governor, engine));
    ndm_i_raise(&governor->books->peak, ndm_i_used_by_all(governor));
}

void ndm_i_books_recount(ndm_governor *governor)
{
    ndm_i_books *books = governor->books;
    const uint32_t known = ndm_i_known(books);
    uint64_t granted[NDM_I_ENGINES] = {0}, all = 0, spillable = 0;
    for (uint32_t i = 0; i < governor->count; i++)
        for (uint32_t e = 0; governor->rows[i].claimed && e < known; e++)
            granted[e] += governor->rows[i].cells[e].granted;
    for (uint32_t e = 0; e < known; e++) {
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
    const uint32_t end = engine == NDM_I_EVERY_ENGINE ? ndm_i_known(governor->books) : engine + 1;
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
    for (uint32_t e = 0; e < ndm_i_known(books); e++)
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

/* Its counts of events go to the engine. What is used is gone before what is granted. */
static void empty(ndm_i_engine *engine, ndm_i_cell *cell)
{
    engine->rejections += atomic_exchange(&cell->rejections, 0);
    engine->waits += atomic_exchange(&cell->waits, 0);
    engine->reclaimed += atomic_exchange(&cell->reclaimed, 0);
    ndm_i_raise(&engine->peak, atomic_exchange(&cell->peak, 0));
    cell->asked = cell->slack = 0;
    cell->used = 0;
    cell->granted = 0;
}

/* Give back all that a row has. Its claim is over in the end: who dies meanwhile leaves a row that is claimed, by nobody. */
static void vacate(ndm_governor *governor, ndm_i_row *row)
{
    ndm_i_books *books = governor->books;
    for (uint32_t e = 0; e < ndm_i_known(books); e++)
        empty(&books->engine[e], &row->cells[e]);
    ndm_i_raise(&books->peak, row->peak);
    const uint32_t number = (uint32_t)(row - governor->rows);
    for (uint32_t i = 0; i < NDM_I_WAITERS; i++)
        if (books->waiters[i].ticket != 0 && books->waiters[i].row == number)
            books->waiters[i].ticket = 0;
    row->used = row->peak = row->real = row->pid = 0;
    row->attention = 0;
    row->claimed = 0;
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
