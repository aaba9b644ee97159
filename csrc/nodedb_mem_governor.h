/* The governor of nodedb_mem: budgets of engines under one ceiling. Part of the public C API. nodedb_mem.h includes it, and
 * says how errors are returned.
 *
 * A governor counts bytes. An engine reserves what it is about to allocate, and releases it afterwards. A reservation is
 * granted if the engine's limit and the ceiling have room for it, and refused otherwise; it never takes either past its
 * limit, whatever other threads and processes do. A refusal changes nothing. Any thread may call any function. Most
 * reservations and releases take no lock, and make no system call.
 *
 *     ndm_governor_options options = {.ceiling = 64 << 20, .warning = 70, .critical = 85, .emergency = 95, .hysteresis = 5};
 *     ndm_governor *governor = ndm_governor_create(&options);
 *     ndm_governor_add_engine(governor, 0, 32 << 20, 1);
 *     if (ndm_governor_reserve(governor, 0, size) == NDM_OK) {
 *         ...
 *         ndm_governor_release(governor, 0, size);
 *     }
 *     ndm_governor_destroy(governor);
 *
 * Shared. ndm_governor_open() maps a file that the governors of other processes map, too: all live under one ceiling. A
 * governor that was opened with options has a claim there, which is a lock of its open file. When its process ends, by
 * kill -9 also, what it had reserved is given back: the next one that finds no room, takes a snapshot, or opens the file,
 * sees to it. If a process was stopped (SIGSTOP) at a moment when it had the lock on the file, what needs the lock fails
 * after ten seconds with NDM_ERR_IO and ETIMEDOUT; what is released meanwhile is released. The file is created 0600 and
 * belongs to its user. It is trusted as far as that user is: whoever may write to it may break the counts, and shortening
 * it while it is mapped is SIGBUS. What can be seen to be wrong when it is opened is an error.
 *
 * Fork. A child of a private governor starts with nothing reserved, its limits as they were; one of a shared governor gets a
 * claim of its own with its first reservation. What the parent had reserved is the parent's: a child that releases it is
 * refused (NDM_ERR_ARGUMENT, unless it has reserved as much itself). ndm_governor_epoch() tells: it grows in a child. */
#ifndef NODEDB_MEM_GOVERNOR_H
#define NODEDB_MEM_GOVERNOR_H

#include "nodedb_mem.h"

#ifdef __cplusplus
extern "C" {
#endif
#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

/* [cdef: the Python binding is generated from the lines up to the closing mark] */

typedef struct ndm_governor ndm_governor;


typedef struct {
    uint64_t ceiling;    /* bytes for all engines, 1 or more */
    uint64_t headroom;   /* of these, what spillable engines together leave to the others */
    uint32_t warning, critical, emergency; /* thresholds of pressure, in per cent: 1 or more, ascending */
    uint32_t hysteresis; /* a level ends when pressure is that many per cent below its threshold; at most 100 */
    uint64_t adopt;      /* 1: where others use the file, go by what it says */
} ndm_governor_options;

/* A governor of this process. NULL: NDM_ERR_ARGUMENT, NDM_ERR_MEMORY. */
ndm_governor *ndm_governor_create(const ndm_governor_options *options);

/* A governor on the file at `path`. The file is made if it is missing. If nobody uses it, it begins anew, with these options
 * and no engines; if somebody does, they have to be those in force (NDM_ERR_ARGUMENT), or adopt them. `options` NULL: to
 * look; the file must be there, and the governor has no claim before it reserves something. NULL: NDM_ERR_ARGUMENT;
 * NDM_ERR_IO (EINVAL: not the file of a governor, or of another version; EUCLEAN: cut short, or its counters contradict
 * each other; EPERM: another user's; EAGAIN: 128 claims are there); NDM_ERR_MEMORY. */
ndm_governor *ndm_governor_open(const char *path, const ndm_governor_options *options);

/* What is still reserved through it is given back. No other call on it is running or follows, but for ndm_g_*. NULL is
 * ignored. */
void ndm_governor_destroy(ndm_governor *governor);

/* Let an engine (0 to 255) have at most `limit` bytes. NDM_ERR_ARGUMENT if all limits would add up to more than the ceiling,
 * or the engine is known with another limit or kind. */
int ndm_governor_add_engine(ndm_governor *governor, int64_t engine, uint64_t limit, int spillable);

/* Change a limit, or the ceiling and the headroom. Below what is reserved is allowed: nothing is taken away, and
 * reservations are refused until it fits. NDM_ERR_ARGUMENT if a raised limit would take the sum of all above the ceiling. */
int ndm_governor_set_limit(ndm_governor *governor, int64_t engine, uint64_t limit);
int ndm_governor_set_ceiling(ndm_governor *governor, uint64_t ceiling, uint64_t headroom);

/* NDM_ERR_BUDGET, NDM_ERR_CEILING, NDM_ERR_ENGINE, NDM_ERR_ARGUMENT. Of a shared one: NDM_ERR_IO. ..._try_...(): without
 * the lock, or NDM_ERR_WAIT, which leaves ndm_last_error() as it is. */
int ndm_governor_reserve(ndm_governor *governor, int64_t engine, uint64_t size);
int ndm_governor_try_reserve(ndm_governor *governor, int64_t engine, uint64_t size);

/* As ndm_governor_reserve(), but a refusal is not counted: for who asks others to give back, and tries again. Where it stays a
 * refusal, ndm_governor_note_rejected() counts it. */
int ndm_governor_attempt(ndm_governor *governor, int64_t engine, uint64_t size);
int ndm_governor_note_rejected(ndm_governor *governor, int64_t engine);

/* Bytes that are taken already, so never refused. What goes beyond a limit is over-commitment. Release them the same way. */
int ndm_governor_charge(ndm_governor *governor, int64_t engine, uint64_t size);

/* NDM_ERR_ARGUMENT if that much is not reserved through this governor. */
int ndm_governor_release(ndm_governor *governor, int64_t engine, uint64_t size);
int ndm_governor_try_release(ndm_governor *governor, int64_t engine, uint64_t size);

/* Wait for room, first come first served among all threads and processes: get in line, wait, and leave the line unless
 * ndm_governor_wait() has returned NDM_OK. Who waits for an engine's limit delays that engine only; who waits for the
 * ceiling delays all. Who has not looked for five seconds, by ndm_governor_wait(), delays nobody and keeps its place.
 * ndm_governor_queue() returns a ticket; NDM_ERR_BUDGET or NDM_ERR_CEILING if it could never fit, which counts as a
 * refusal; NDM_ERR_IO with EAGAIN if 512 wait. ndm_governor_wait(): NDM_OK if it is reserved now; NDM_ERR_WAIT after
 * `timeout` nanoseconds, or a signal; with timeout 0, one look, and why not. */
int64_t ndm_governor_queue(ndm_governor *governor, int64_t engine, uint64_t size);
int ndm_governor_wait(ndm_governor *governor, int64_t ticket, uint64_t timeout);
void ndm_governor_leave(ndm_governor *governor, int64_t ticket);

/* For who waits by other means, such as an event loop: a number that changes when waiters should look again. Waits while
 * the number is `seen`, for `timeout` nanoseconds at most, or until a signal comes. `seen` -1: returns at once. */
int64_t ndm_governor_changes(ndm_governor *governor, int64_t seen, uint64_t timeout);

enum ndm_pressure { NDM_NORMAL = 0, NDM_WARNING = 1, NDM_CRITICAL = 2, NDM_EMERGENCY = 3 };

/* The level: an engine's, or with -1 that of all, which is also raised by what ndm_governor_note_real() was told. */
int ndm_governor_pressure(ndm_governor *governor, int64_t engine);

/* Bytes reserved now, by all processes: of an engine, or with -1 of all. */
int64_t ndm_governor_allocated(ndm_governor *governor, int64_t engine);

/* What is real: the bytes of RAM that this process has, and in per cent how much is in use of what may be. */
int ndm_governor_note_real(ndm_governor *governor, uint64_t bytes, uint32_t percent);

/* Ask other processes to give back `size` bytes of an engine, or with -1 of any: how many processes hold some. Each finds
 * it by ndm_governor_is_asked(), and takes it up by ndm_governor_asked(), which fills in 256 sizes and returns how many are
 * not 0. ndm_governor_note_reclaimed() adds to the figures. */
int ndm_governor_ask(ndm_governor *governor, int64_t engine, uint64_t size);
int ndm_governor_is_asked(const ndm_governor *governor);
int64_t ndm_governor_asked(ndm_governor *governor, uint64_t *sizes);
int ndm_governor_note_reclaimed(ndm_governor *governor, int64_t engine, uint64_t size);

typedef struct {
    uint64_t known, spillable; /* 1 or 0 */
    uint64_t limit, allocated, peak;
    uint64_t rejections, waits; /* counted since the governor began */
    uint64_t reclaimed;         /* bytes that reclaimers have freed */
    uint64_t pressure;          /* an ndm_pressure */
} ndm_engine_figures;

typedef struct {
    uint64_t pid, allocated, peak;
    uint64_t real_bytes; /* of RAM, as last noted; 0: not known */
} ndm_process_figures;

typedef struct {
    uint64_t ceiling, headroom;
    uint64_t allocated; /* bytes reserved: never above the ceiling, but for what was charged, or a ceiling that was lowered */
    uint64_t granted;   /* these, and what processes keep ready for their next reservations */
    uint64_t peak;      /* with several processes: the highest sum seen when one of them took the lock */
    uint64_t waiting;   /* who stands in line */
    uint64_t repairs;   /* deaths in the middle of a change, made good */
    uint64_t epoch;     /* 0; grows in forked children */
    uint64_t pressure;  /* of all, an ndm_pressure */
    uint64_t warning, critical, emergency, hysteresis; /* of pressure, in per cent */
    uint64_t engine_count;  /* entries of `engines` that are filled in */
    uint64_t process_count; /* and of `processes` */
    ndm_engine_figures engines[256];
    ndm_process_figures processes[128];
} ndm_governor_figures;

int ndm_governor_snapshot(ndm_governor *governor, ndm_governor_figures *out);

/* 0; grows when a forked child starts anew. */
int64_t ndm_governor_epoch(ndm_governor *governor);

/* How many invariants of the books are broken: 0. For tests and for hunting a bug. */
int64_t ndm_governor_check(ndm_governor *governor);

/* A number that stands for the governor, as that of a region. It is never 0, never used again, below 2^63, and owns nothing;
 * NDM_ERR_CLOSED once the governor is destroyed. Any thread. 0 on failure: 1024 governors have one. */
uint64_t ndm_governor_handle(ndm_governor *governor);
int ndm_g_reserve(uint64_t handle, int64_t engine, uint64_t size);
int ndm_g_release(uint64_t handle, int64_t engine, uint64_t size);
int ndm_g_charge(uint64_t handle, int64_t engine, uint64_t size);
int ndm_g_pressure(uint64_t handle, int64_t engine);
int64_t ndm_g_allocated(uint64_t handle, int64_t engine);

/* [/cdef] */

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif

#endif
