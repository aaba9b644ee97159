/* Reserve, release, charge. The way without the lock comes first: from slack, to slack. What it cannot do is done with the
 * lock, where all layers are looked at before any is changed: a refusal has nothing to roll back. */
#include "governor/reserve.h"

#include "governor/lock.h"
#include "governor/rows.h"
#include "os/bits.h"
#include "os/patience.h"
#include "os/status.h"

int ndm_i_check_call(const ndm_governor *governor, int64_t engine, uint64_t size)
{
    if (!governor)
        return ndm_i_fail(NDM_ERR_CLOSED, "no governor");
    if (engine < 0 || engine >= NDM_I_ENGINES)
        return ndm_i_fail(NDM_ERR_ARGUMENT, "engine must be 0 to 255");
    if (size > INT64_MAX)
        return ndm_i_fail(NDM_ERR_ARGUMENT, "a size must be below 2**63");
    return NDM_OK;
}

/* ---- without the lock ----------------------------------------------------------------------------------- */

static void enter(ndm_i_row *row, uint32_t engine, uint64_t size)
{
    ndm_i_cell *cell = &row->cells[engine];
    ndm_i_raise(&cell->peak, atomic_fetch_add_explicit(&cell->used, size, memory_order_relaxed) + size);
    ndm_i_raise(&row->peak, atomic_fetch_add_explicit(&row->used, size, memory_order_relaxed) + size);
}

int ndm_governor_try_reserve(ndm_governor *governor, int64_t engine, uint64_t size)
{
    const int status = ndm_i_check_call(governor, engine, size);
    if (status != NDM_OK)
        return status;
    ndm_i_row *row = atomic_load_explicit(&governor->row, memory_order_acquire);
    if (!row || size == 0 || !ndm_i_is_process(governor->process) ||
        atomic_load_explicit(&governor->books->strict, memory_order_acquire) != 0)
        return NDM_ERR_WAIT;
    ndm_i_cell *cell = &row->cells[engine];
    uint64_t word = atomic_load_explicit(&cell->slack, memory_order_relaxed);
    do
        if ((word & NDM_I_SLACK_MASK) < size)
            return NDM_ERR_WAIT;
    while (!atomic_compare_exchange_weak_explicit(&cell->slack, &word, word - size, memory_order_acq_rel,
                                                  memory_order_relaxed));
    enter(row, (uint32_t)engine, size);
    return NDM_OK;
}

/* Take from used. false: that much is not reserved. */
static bool leave(ndm_i_row *row, uint32_t engine, uint64_t size)
{
    ndm_i_cell *cell = &row->cells[engine];
    uint64_t used = atomic_load_explicit(&cell->used, memory_order_relaxed);
    do
        if (used < size)
            return false;
    while (!atomic_compare_exchange_weak_explicit(&cell->used, &used, used - size, memory_order_relaxed,
                                                  memory_order_relaxed));
    atomic_fetch_sub_explicit(&row->used, size, memory_order_relaxed);
    return true;
}

/* ---- with the lock -------------------------------------------------------------------------------------- */

static uint64_t plus(uint64_t a, uint64_t b) { return a > UINT64_MAX - b ? UINT64_MAX : a + b; }

/* Bytes that waiters are to have before a reservation with that ticket. */
typedef struct {
    uint64_t engine, all, spillable;
} ahead;

/* Waiters look ten times a second. Who has not for that long (ns) is stopped, or its event loop is. */
#define ABSENT UINT64_C(5000000000)

/* Who waits for the same engine comes first; so does who waits for nothing but the ceiling. */
static ahead waiters_ahead(const ndm_i_books *books, uint32_t engine, uint64_t ticket)
{
    ahead sum = {0};
    const uint64_t now = books->waiting > 0 ? ndm_i_now() : 0;
    for (uint32_t i = 0; books->waiting > 0 && i < NDM_I_WAITERS; i++) {
        const ndm_i_waiter *other = &books->waiters[i];
        if (other->ticket == 0 || other->ticket >= ticket || other->engine >= NDM_I_ENGINES)
            continue;
        if (plus(other->looked, ABSENT) < now)
            continue;
        const ndm_i_engine *theirs = &books->engine[other->engine];
        if (other->size > theirs->limit)
            continue; /* it was lowered: that one waits in vain */
        if (other->engine == engine)
            sum.engine = plus(sum.engine, other->size);
        if (plus(theirs->granted, other->size) > theirs->limit)
            continue; /* not the ceiling stops it */
        sum.all = plus(sum.all, other->size);
        if (theirs->state & NDM_I_SPILLABLE)
            sum.spillable = plus(sum.spillable, other->size);
    }
    return sum;
}

static int refused(int status, uint32_t engine, uint64_t size, uint64_t allocated, uint64_t limit, uint64_t waiting)
{
    return ndm_i_fail_budget((ndm_error){.status = status,
                                         .required = size,
                                         .limit = limit,
                                         .allocated = allocated,
                                         .waiting = waiting,
                                         .engine = engine,
                                         .message = status == NDM_ERR_BUDGET ? "the engine's limit is reached"
                                                                             : "the ceiling is reached"});
}

/* NDM_OK if the layers have room; `none`: as though nothing were granted, and nobody waited. */
static int look(const ndm_i_books *books, uint32_t engine, uint64_t size, uint64_t ticket, bool none)
{
    const ndm_i_engine *e = &books->engine[engine];
    const ahead before = none ? (ahead){0} : waiters_ahead(books, engine, ticket);
    const uint64_t own = none ? 0 : e->granted, all = none ? 0 : books->granted, spill = none ? 0 : books->spillable;
    const uint64_t room = books->ceiling - ndm_i_min(books->headroom, books->ceiling);
    if (plus(plus(own, before.engine), size) > e->limit)
        return refused(NDM_ERR_BUDGET, engine, size, own, e->limit, before.engine);
    if (plus(plus(all, before.all), size) > books->ceiling)
        return refused(NDM_ERR_CEILING, engine, size, all, books->ceiling, before.all);
    if (e->state & NDM_I_SPILLABLE && plus(plus(spill, before.spillable), size) > room)
        return refused(NDM_ERR_CEILING, engine, size, spill, room, before.spillable);
    return NDM_OK;
}

int ndm_i_can_ever_fit(ndm_governor *governor, uint32_t engine, uint64_t size)
{
    if (!(governor->books->engine[engine].state & NDM_I_KNOWN))
        return ndm_i_fail_budget((ndm_error){.status = NDM_ERR_ENGINE, .engine = engine, .message = "unknown"});
    return look(governor->books, engine, size, NDM_I_NO_TICKET, true);
}

/* What may be had besides for slack: a part of what is left, so that others find something, too. */
static uint64_t spare(const ndm_i_books *books, uint32_t engine, uint64_t size)
{
    const ndm_i_engine *e = &books->engine[engine];
    if (books->strict)
        return 0;
    uint64_t left = ndm_i_min(e->limit - e->granted, books->ceiling - books->granted);
    if (e->state & NDM_I_SPILLABLE)
        left = ndm_i_min(left, books->ceiling - ndm_i_min(books->headroom, books->ceiling) - books->spillable);
    return ndm_i_min(e->keep / 2, (left - size) / 4);
}

int ndm_i_budget_take(ndm_governor *governor, uint32_t engine, uint64_t size, uint64_t ticket)
{
    ndm_i_books *books = governor->books;
    int status = NDM_OK;
    if (!(books->engine[engine].state & NDM_I_KNOWN))
        return ndm_i_can_ever_fit(governor, engine, 0);
    if (!atomic_load(&governor->row) && (status = ndm_i_row_claim(governor)) != NDM_OK)
        return status;
    ndm_i_row *row = atomic_load(&governor->row);
    ndm_i_sweep(governor, row, engine, 0);
    status = size == 0 ? NDM_OK : look(books, engine, size, ticket, false);
    /* Once more for what is released while the sweep goes from row to row. */
    for (int i = 0; status != NDM_OK && i < 3; i++) {
        const uint64_t found = ndm_i_sweep_all(governor, status == NDM_ERR_BUDGET ? engine : NDM_I_EVERY_ENGINE);
        if (found + ndm_i_rows_reap(governor) == 0 && i > 0)
            break;
        status = look(books, engine, size, ticket, false);
    }
    if (status != NDM_OK)
        return status;
    const uint64_t more = size == 0 ? 0 : spare(books, engine, size);
    ndm_i_grant(governor, row, engine, size + more);
    enter(row, engine, size);
    atomic_fetch_add(&row->cells[engine].slack, more);
    ndm_i_note_peaks(governor, engine);
    return NDM_OK;
}

int ndm_governor_attempt(ndm_governor *governor, int64_t engine, uint64_t size)
{
    int status = ndm_governor_try_reserve(governor, engine, size);
    if (status != NDM_ERR_WAIT || (status = ndm_i_books_lock(governor)) != NDM_OK)
        return status;
    status = ndm_i_budget_take(governor, (uint32_t)engine, size, NDM_I_NO_TICKET);
    ndm_i_books_settle(governor);
    ndm_i_books_unlock(governor);
    return status;
}

int ndm_governor_note_rejected(ndm_governor *governor, int64_t engine)
{
    const int status = ndm_i_check_call(governor, engine, 0);
    ndm_i_row *row = status == NDM_OK ? atomic_load(&governor->row) : NULL;
    if (row && ndm_i_is_process(governor->process))
        row->cells[engine].rejections++;
    return status;
}

int ndm_governor_reserve(ndm_governor *governor, int64_t engine, uint64_t size)
{
    const int status = ndm_governor_attempt(governor, engine, size);
    if (status == NDM_ERR_BUDGET || status == NDM_ERR_CEILING)
        ndm_governor_note_rejected(governor, engine);
    return status;
}

int ndm_governor_charge(ndm_governor *governor, int64_t engine, uint64_t size)
{
    int status = ndm_i_check_call(governor, engine, size);
    if (status != NDM_OK || (status = ndm_i_books_lock(governor)) != NDM_OK)
        return status;
    if (!(governor->books->engine[engine].state & NDM_I_KNOWN))
        status = ndm_i_can_ever_fit(governor, (uint32_t)engine, 0);
    else if (!atomic_load(&governor->row))
        status = ndm_i_row_claim(governor);
    if (status == NDM_OK && size > INT64_MAX - ndm_i_min(governor->books->granted, INT64_MAX))
        status = ndm_i_fail(NDM_ERR_ARGUMENT, "all together must be below 2**63");
    if (status == NDM_OK) {
        ndm_i_row *row = atomic_load(&governor->row);
        ndm_i_sweep(governor, row, (uint32_t)engine, 0);
        ndm_i_grant(governor, row, (uint32_t)engine, size);
        enter(row, (uint32_t)engine, size);
        ndm_i_note_peaks(governor, (uint32_t)engine);
        ndm_i_books_settle(governor);
    }
    ndm_i_books_unlock(governor);
    return status;
}

/* Without the lock, which cannot be had: the next one that has it sweeps. false: more is released than is reserved, or slack
 * has no room for so much. */
static bool put_by(ndm_governor *governor, uint32_t engine, uint64_t size)
{
    ndm_i_row *row = atomic_load(&governor->row);
    if (!row || !ndm_i_is_process(governor->process) || !leave(row, engine, size))
        return false;
    uint64_t word = row->cells[engine].slack;
    do
        if ((word & NDM_I_SLACK_MASK) + size > NDM_I_SLACK_MASK) {
            enter(row, engine, size);
            return false;
        }
    while (!atomic_compare_exchange_weak(&row->cells[engine].slack, &word, word + size));
    return true;
}

/* Give back what a release has left, or `size` that was not released yet. */
static int give(ndm_governor *governor, uint32_t engine, uint64_t size)
{
    int status = ndm_i_books_lock(governor);
    if (status != NDM_OK)
        return size == 0 || (size <= NDM_I_SLACK_MASK && put_by(governor, engine, size)) ? NDM_OK : status;
    ndm_i_row *row = atomic_load(&governor->row);
    if (size > 0 && (!row || !leave(row, engine, size))) {
        status = ndm_i_fail(NDM_ERR_ARGUMENT, "more is released than is reserved");
    } else if (row) {
        ndm_i_ungrant(governor, row, engine, size);
        const ndm_i_books *books = governor->books;
        ndm_i_sweep(governor, row, engine, books->strict ? 0 : books->engine[engine].keep / 2);
        ndm_i_books_settle(governor);
        ndm_i_notify(governor);
    }
    ndm_i_books_unlock(governor);
    return status;
}

int ndm_governor_try_release(ndm_governor *governor, int64_t engine, uint64_t size)
{
    const int status = ndm_i_check_call(governor, engine, size);
    if (status != NDM_OK)
        return status;
    ndm_i_row *row = atomic_load_explicit(&governor->row, memory_order_acquire);
    if (!row || !ndm_i_is_process(governor->process))
        return NDM_ERR_WAIT;
    const uint64_t keep = atomic_load_explicit(&governor->books->engine[engine].keep, memory_order_relaxed);
    ndm_i_cell *cell = &row->cells[engine];
    const uint64_t slack = atomic_load_explicit(&cell->slack, memory_order_relaxed) & NDM_I_SLACK_MASK;
    if (size > keep || slack > keep - size || atomic_load(&governor->books->strict) != 0)
        return NDM_ERR_WAIT;
    if (!leave(row, (uint32_t)engine, size))
        return ndm_i_fail(NDM_ERR_ARGUMENT, "more is released than is reserved");
    atomic_fetch_add(&cell->slack, size);
    /* A waiter that came meanwhile may have swept before: it has to be told. */
    return atomic_load(&governor->books->strict) == 0 ? NDM_OK : give(governor, (uint32_t)engine, 0);
}

int ndm_governor_release(ndm_governor *governor, int64_t engine, uint64_t size)
{
    const int status = ndm_governor_try_release(governor, engine, size);
    return status == NDM_ERR_WAIT ? give(governor, (uint32_t)engine, size) : status;
}
