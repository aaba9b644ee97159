/* What a governor shows: figures, pressure, and whether its books are sound. */
#include "governor/figures.h"

#include "governor/lock.h"
#include "governor/reserve.h"
#include "governor/rows.h"
#include "os/bits.h"
#include "os/status.h"

/* ---- pressure ------------------------------------------------------------------------------------------- */

static uint32_t percent(uint64_t used, uint64_t limit)
{
    if (limit == 0)
        return used > 0 ? 100 : 0;
    return (uint32_t)ndm_i_min((uint64_t)((double)used / (double)limit * 100.0), 1000);
}

/* Up at a threshold, down only when as far below it as the hysteresis says. */
static uint32_t level_of(const ndm_i_books *books, uint32_t percent, uint32_t before)
{
    uint32_t level = 0;
    while (level < 3 && percent >= books->thresholds[level])
        level++;
    if (level >= before)
        return level;
    while (before > level && percent + books->hysteresis < books->thresholds[before - 1])
        before--;
    return before;
}

/* The level of an engine, or with NDM_I_ENGINES that of all, from now on. */
static uint32_t note_level(ndm_governor *governor, uint32_t which, uint64_t used)
{
    const ndm_i_books *books = governor->books;
    uint32_t share;
    if (which < NDM_I_ENGINES)
        share = percent(used, books->engine[which].limit);
    else
        share = (uint32_t)ndm_i_max(percent(used, books->ceiling), governor->outer);
    _Atomic uint32_t *level = &governor->levels[which];
    const uint32_t found = level_of(books, share, ndm_i_is_process(governor->process) ? *level : 0);
    atomic_store(level, found);
    return found;
}

int ndm_governor_pressure(ndm_governor *governor, int64_t engine)
{
    const int status = ndm_i_check_call(governor, engine < 0 ? 0 : engine, 0);
    if (status != NDM_OK)
        return status;
    if (engine >= 0 && !(governor->books->engine[engine].state & NDM_I_KNOWN))
        return ndm_i_can_ever_fit(governor, (uint32_t)engine, 0);
    if (engine >= 0)
        return (int)note_level(governor, (uint32_t)engine, ndm_i_used(governor, (uint32_t)engine));
    return (int)note_level(governor, NDM_I_ENGINES, ndm_i_used_by_all(governor));
}

/* ---- figures -------------------------------------------------------------------------------------------- */

static void add_row(ndm_governor_figures *out, const ndm_i_row *row)
{
    out->processes[out->process_count++] =
        (ndm_process_figures){.pid = row->pid, .allocated = row->used, .peak = row->peak, .real_bytes = row->real};
    out->peak = ndm_i_max(out->peak, row->peak);
    for (uint64_t e = 0; e < out->engine_count; e++) {
        const ndm_i_cell *cell = &row->cells[e];
        ndm_engine_figures *engine = &out->engines[e];
        const uint64_t used = cell->used;
        engine->allocated += used;
        engine->peak = ndm_i_max(engine->peak, cell->peak);
        engine->rejections += cell->rejections;
        engine->waits += cell->waits;
        engine->reclaimed += cell->reclaimed;
    }
}

static void fill(ndm_governor *governor, ndm_governor_figures *out)
{
    const ndm_i_books *books = governor->books;
    out->ceiling = books->ceiling;
    out->headroom = books->headroom;
    out->granted = books->granted;
    out->warning = books->thresholds[0];
    out->critical = books->thresholds[1];
    out->emergency = books->thresholds[2];
    out->hysteresis = books->hysteresis;
    out->peak = books->peak;
    out->waiting = books->waiting;
    out->repairs = books->repairs;
    out->epoch = governor->epoch;
    out->engine_count = ndm_i_known(books);
    out->process_count = out->allocated = 0;
    for (uint64_t e = 0; e < out->engine_count; e++) {
        const ndm_i_engine *engine = &books->engine[e];
        out->engines[e] = (ndm_engine_figures){.known = (engine->state & NDM_I_KNOWN) != 0,
                                               .spillable = (engine->state & NDM_I_SPILLABLE) != 0,
                                               .limit = engine->limit,
                                               .peak = engine->peak,
                                               .rejections = engine->rejections,
                                               .waits = engine->waits,
                                               .reclaimed = engine->reclaimed};
    }
    for (uint32_t i = 0; i < governor->count; i++)
        if (governor->rows[i].claimed)
            add_row(out, &governor->rows[i]);
    for (uint64_t e = 0; e < out->engine_count; e++)
        out->allocated += out->engines[e].allocated;
}

int ndm_governor_snapshot(ndm_governor *governor, ndm_governor_figures *out)
{
    int status = ndm_i_check_call(governor, 0, 0);
    if (status != NDM_OK || (status = ndm_i_books_lock(governor)) != NDM_OK)
        return status;
    ndm_i_rows_reap(governor);
    fill(governor, out);
    if (governor->shared)
        ndm_i_raise(&governor->books->peak, out->allocated);
    out->peak = ndm_i_max(out->peak, out->allocated);
    for (uint64_t e = 0; e < out->engine_count; e++) {
        if (governor->shared)
            ndm_i_raise(&governor->books->engine[e].peak, out->engines[e].allocated);
        out->engines[e].peak = ndm_i_max(out->engines[e].peak, out->engines[e].allocated);
        out->engines[e].pressure = note_level(governor, (uint32_t)e, out->engines[e].allocated);
    }
    out->pressure = note_level(governor, NDM_I_ENGINES, out->allocated);
    ndm_i_books_unlock(governor);
    return NDM_OK;
}

int64_t ndm_governor_allocated(ndm_governor *governor, int64_t engine)
{
    const int status = ndm_i_check_call(governor, engine < 0 ? 0 : engine, 0);
    if (status != NDM_OK)
        return status;
    return (int64_t)(engine < 0 ? ndm_i_used_by_all(governor) : ndm_i_used(governor, (uint32_t)engine));
}

/* ---- what a watch finds ---------------------------------------------------------------------------------- */

int ndm_governor_note_real(ndm_governor *governor, uint64_t bytes, uint32_t used)
{
    int status = ndm_i_check_call(governor, 0, bytes);
    if (status != NDM_OK || (status = ndm_i_books_lock(governor)) != NDM_OK)
        return status;
    if (!atomic_load(&governor->row))
        status = ndm_i_row_claim(governor);
    if (status == NDM_OK) {
        atomic_load(&governor->row)->real = bytes;
        governor->outer = used;
    }
    ndm_i_books_unlock(governor);
    return status;
}

/* ---- the checker ---------------------------------------------------------------------------------------- */

static int64_t check_engine(const ndm_governor *governor, uint32_t engine)
{
    const ndm_i_books *books = governor->books;
    uint64_t granted = 0;
    int64_t broken = 0;
    for (uint32_t i = 0; i < governor->count; i++) {
        const ndm_i_cell *cell = &governor->rows[i].cells[engine];
        if (!governor->rows[i].claimed)
            broken += cell->granted != 0 || cell->used != 0;
        else
            granted += cell->granted;
        broken += cell->used > cell->granted || (cell->slack & NDM_I_SLACK_MASK) > cell->granted;
    }
    broken += granted != books->engine[engine].granted;
    broken += !(books->strict & NDM_I_OVER) && granted > books->engine[engine].limit;
    broken += granted > 0 && (engine >= ndm_i_known(books) || !(books->engine[engine].state & NDM_I_KNOWN));
    return broken;
}

int64_t ndm_i_books_check(const ndm_governor *governor)
{
    const ndm_i_books *books = governor->books;
    uint64_t granted = 0, spillable = 0, waiting = 0;
    int64_t broken = books->known > NDM_I_ENGINES;
    for (uint32_t e = 0; e < NDM_I_ENGINES; e++) {
        broken += check_engine(governor, e);
        granted += books->engine[e].granted;
        spillable += books->engine[e].state & NDM_I_SPILLABLE ? books->engine[e].granted : 0;
    }
    for (uint32_t i = 0; i < NDM_I_WAITERS; i++) {
        const ndm_i_waiter *waiter = &books->waiters[i];
        if (waiter->ticket == 0)
            continue;
        waiting++;
        broken += waiter->row >= governor->count || waiter->engine >= NDM_I_ENGINES ||
                  waiter->ticket > books->next_ticket;
    }
    broken += granted != books->granted || spillable != books->spillable || waiting != books->waiting;
    broken += books->sweep.row != 0 || (granted > 0 && books->ceiling == 0) || books->headroom > INT64_MAX;
    broken += !(books->strict & NDM_I_OVER) && granted > books->ceiling;
    broken += waiting > 0 && !(books->strict & NDM_I_WAITING);
    return broken;
}

int64_t ndm_governor_check(ndm_governor *governor)
{
    int status = ndm_i_check_call(governor, 0, 0);
    if (status != NDM_OK || (status = ndm_i_books_lock(governor)) != NDM_OK)
        return status;
    const int64_t broken = ndm_i_books_check(governor);
    ndm_i_books_unlock(governor);
    return broken;
}
