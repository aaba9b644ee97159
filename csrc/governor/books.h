/* The books: what a governor counts, as it lies in memory, a process's own or a file's that several map.
 *
 *   totals     what was granted, of each engine and of all: never more than its limit by a reservation
 *   row        what one claim holds of them; a claim is a governor that one process has opened
 *   cell       an engine in a row
 *   granted    bytes of the totals that a row has
 *   used       of these, reserved
 *   slack      of these, ready for the row's next reservation
 *   sweep      take slack back into the totals
 *   strict     nobody passes by the lock: somebody waits, or something is over its limit
 *
 * Invariants. Changed under the lock only: granted, the totals, limits, waiters, rows' claims.
 *   The cells' granted add up to the totals. (After a death inside the lock: as soon as the next one has it; lock.c.)
 *   used + slack <= granted in each cell, at any time: a reservation takes from slack before it adds to used, a release
 *   takes from used before it adds to slack. So what is used is within the limits whenever what is granted is.
 *   While a total is over its limit, no cell keeps slack of it for long: releases give back, reservations sweep first.
 *   A release adds to slack, then looks at strict; a waiter sets strict, then sweeps. One of them sees the other.
 *   A row that is not claimed is all zeros.
 *
 * A process may be killed, or stopped, at any instruction. Killed, it leaves its claim to the reaper, and `dirty` to the
 * next one with the lock (lock.c). Stopped with the lock, it makes the others wait for some seconds, and then they are
 * refused; what they release goes to slack without the lock. Stopped in the line of waiters, it delays nobody.
 *
 * Whoever may write to the file may break the books: it is the user's own (0600), and no further than that is trusted. What
 * is used as an index is checked all the same. */
#ifndef NDM_BOOKS_H
#define NDM_BOOKS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum {
    NDM_I_ENGINES = 256,
    NDM_I_ROWS = 128,    /* claims on a file at a time */
    NDM_I_WAITERS = 512, /* at a time */
    NDM_I_LAYOUT = 2,    /* grows when anything below changes */
    NDM_I_SLACK_BITS = 48
};

#define NDM_I_BOOKS_MAGIC UINT64_C(0x4e52564f474d444e) /* "NDMGOVRN" */
#define NDM_I_SLACK_MASK ((UINT64_C(1) << NDM_I_SLACK_BITS) - 1)
#define NDM_I_MOST_KEPT (UINT64_C(1) << 40) /* slack never comes near 2^48 */

/* A cache line. */
typedef struct {
    _Alignas(64) _Atomic uint64_t slack; /* bytes, and above them how often it was swept */
    _Atomic uint64_t used, peak;
    _Atomic uint64_t granted;
    _Atomic uint64_t rejections, waits, reclaimed;
    _Atomic uint64_t asked; /* bytes that another row wants back from this one */
} ndm_i_cell;

typedef struct {
    _Alignas(64) _Atomic uint64_t used;
    _Atomic uint64_t peak;
    _Atomic uint32_t claimed;
    _Atomic uint32_t attention; /* a cell was asked */
    _Atomic uint64_t pid;       /* for people to read: the claim is a lock, not a number */
    _Atomic uint64_t real;      /* bytes of RAM that the process has, as its watch found; 0: not known */
    ndm_i_cell cells[NDM_I_ENGINES];
} ndm_i_row;

enum { NDM_I_KNOWN = 1, NDM_I_SPILLABLE = 2 };

/* An engine in all rows. Rejections, waits and what was reclaimed: of rows that have ended. */
typedef struct {
    _Alignas(64) _Atomic uint64_t limit;
    _Atomic uint64_t granted, peak;
    _Atomic uint64_t keep; /* the most slack that a cell keeps */
    _Atomic uint64_t state;
    _Atomic uint64_t rejections, waits, reclaimed;
} ndm_i_engine;

typedef struct {
    uint64_t ticket; /* in the order of arrival; 0: unused */
    uint64_t size;
    _Atomic uint64_t looked; /* when it did so last (ndm_i_now); 0: it has left, and could not say so with the lock */
    uint32_t row, engine;
} ndm_i_waiter;

enum { NDM_I_WAITING = 1, NDM_I_OVER = 2 };

typedef struct {
    /* What the file is. */
    uint64_t magic;
    uint32_t layout, engines, rows, waiters_size;
    uint64_t size, row_size;
    /* Read by each reservation, changed seldom. */
    _Alignas(64) _Atomic uint32_t strict;
    /* Changed when something was given back, or has to be looked at again: what waiters sleep on. */
    _Alignas(64) _Atomic uint32_t changes;
    /* Somebody is inside the lock. */
    _Atomic uint32_t dirty;
    /* The sweep that is being made: which cell, how much, what it had been granted, and its count of sweeps. */
    struct {
        _Atomic uint32_t row, engine; /* number of the row and 1; 0: none */
        _Atomic uint64_t taken, granted, count;
    } sweep;
    _Atomic uint64_t repairs;
    _Atomic uint64_t ceiling, headroom, granted, spillable, peak;
    uint32_t known; /* engines that may be known are below */
    uint32_t waiting;
    uint64_t next_ticket;
    uint32_t thresholds[3], hysteresis; /* of pressure, in per cent */
    ndm_i_engine engine[NDM_I_ENGINES];
    ndm_i_waiter waiters[NDM_I_WAITERS];
} ndm_i_books;

/* Engines that may be known are below, whatever the file says. */
static inline uint32_t ndm_i_known(const ndm_i_books *books)
{
    return books->known < NDM_I_ENGINES ? books->known : NDM_I_ENGINES;
}

_Static_assert(sizeof(ndm_i_cell) == 64 && sizeof(ndm_i_engine) == 64, "an engine is a cache line");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && ATOMIC_INT_LOCK_FREE == 2, "processes share no lock of the C library");

#endif
