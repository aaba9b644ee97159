/* What rows have: claimed, granted, swept, added up, and given back when a claim has ended. It is done with the lock, unless
 * the function says otherwise. */
#ifndef NDM_GOVERNOR_ROWS_H
#define NDM_GOVERNOR_ROWS_H

#include "governor/governor.h"

#define NDM_I_EVERY_ENGINE NDM_I_ENGINES

/* The byte of the file that stands for a row's claim; that of the lock on the books is 0. */
static inline uint64_t ndm_i_claim_byte(uint32_t row) { return 1 + (uint64_t)row; }

static inline void ndm_i_raise(_Atomic uint64_t *peak, uint64_t value)
{
    uint64_t before = atomic_load_explicit(peak, memory_order_relaxed);
    while (before < value && !atomic_compare_exchange_weak_explicit(peak, &before, value, memory_order_relaxed,
                                                                    memory_order_relaxed))
        ;
}

/* Bytes reserved now, of an engine in all rows; and of all engines. Without the lock, too. */
uint64_t ndm_i_used(const ndm_governor *governor, uint32_t engine);
uint64_t ndm_i_used_by_all(const ndm_governor *governor);

/* The highest sums: a row alone knows its own. */
void ndm_i_note_peaks(ndm_governor *governor, uint32_t engine);

/* Add the totals up anew, from the rows. */
void ndm_i_books_recount(ndm_governor *governor);

/* Have a row of one's own. NDM_ERR_IO with EAGAIN if all are claimed. */
int ndm_i_row_claim(ndm_governor *governor);

/* What rows have whose process is gone is given back. How many there were. */
uint32_t ndm_i_rows_reap(ndm_governor *governor);

/* End this governor's own claim. */
void ndm_i_row_leave(ndm_governor *governor);

/* Grant a row more: the totals first. */
void ndm_i_grant(ndm_governor *governor, ndm_i_row *row, uint32_t engine, uint64_t size);

/* What was granted and is neither used nor slack goes back into the totals. */
void ndm_i_ungrant(ndm_governor *governor, ndm_i_row *row, uint32_t engine, uint64_t size);

/* Take back what a cell has of slack beyond `leave`. Bytes taken. */
uint64_t ndm_i_sweep(ndm_governor *governor, ndm_i_row *row, uint32_t engine, uint64_t leave);

/* Sweep an engine, or every one, in all rows. Bytes taken. */
uint64_t ndm_i_sweep_all(ndm_governor *governor, uint32_t engine);

/* After a change of totals or limits: is anything over its limit? Where something is, no slack of it stays. */
void ndm_i_books_settle(ndm_governor *governor);

/* Have the waiters look again. */
void ndm_i_notify(ndm_governor *governor);

#endif
