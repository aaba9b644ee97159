/* How a governor begins, what it may have, and how it ends. */
#include "governor/figures.h"
#include "governor/lock.h"
#include "governor/number.h"
#include "governor/reserve.h"
#include "governor/rows.h"
#include "os/bits.h"
#include "os/bytes.h"
#include "os/locks.h"
#include "os/status.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define ROWS_AT ndm_i_round_up(sizeof(ndm_i_books), 4096)
#define PATIENCE UINT64_C(10000000000)
#define FILE_SIZE (ROWS_AT + NDM_I_ROWS * sizeof(ndm_i_row))

/* ---- what engines may have: with the lock --------------------------------------------------------------- */

static bool is_known(const ndm_i_books *books, uint32_t engine)
{
    return books->engine[engine].state & NDM_I_KNOWN;
}

static uint64_t limits_of_others(const ndm_i_books *books, uint32_t engine)
{
    uint64_t sum = 0;
    for (uint32_t e = 0; e < ndm_i_known(books); e++)
        if (e != engine && is_known(books, e))
            sum += books->engine[e].limit; /* at most what a ceiling was: no overflow */
    return sum;
}

/* Slack is a part of the limit: so large that it serves many reservations, so small that all rows' leaves room. */
static void set_keeps(ndm_governor *governor)
{
    ndm_i_books *books = governor->books;
    for (uint32_t e = 0; e < ndm_i_known(books); e++) {
        const uint64_t most = ndm_i_min(books->engine[e].limit, books->ceiling);
        books->engine[e].keep = ndm_i_min(most / (governor->shared ? 2 * NDM_I_ROWS : 4), NDM_I_MOST_KEPT);
    }
}

/* The state comes last: who dies before has added nothing. */
static int set_limit(ndm_governor *governor, uint32_t engine, uint64_t limit, uint64_t state)
{
    ndm_i_books *books = governor->books;
    ndm_i_engine *e = &books->engine[engine];
    const uint64_t before = is_known(books, engine) ? e->limit : 0;
    if (limit > before && limits_of_others(books, engine) + limit > books->ceiling)
        return ndm_i_fail(NDM_ERR_ARGUMENT, "the limits of all engines add up to more than the ceiling");
    books->known = (uint32_t)ndm_i_max(books->known, (uint64_t)engine + 1);
    e->limit = limit;
    e->state = state;
    set_keeps(governor);
    ndm_i_books_settle(governor);
    ndm_i_notify(governor);
    return NDM_OK;
}

int ndm_governor_add_engine(ndm_governor *governor, int64_t engine, uint64_t limit, int spillable)
{
    int status = ndm_i_check_call(governor, engine, limit);
    if (status != NDM_OK || (status = ndm_i_books_lock(governor)) != NDM_OK)
        return status;
    const ndm_i_books *books = governor->books;
    const ndm_i_engine *e = &books->engine[engine];
    const uint64_t state = NDM_I_KNOWN | (spillable ? NDM_I_SPILLABLE : 0);
    if (!is_known(books, (uint32_t)engine))
        status = set_limit(governor, (uint32_t)engine, limit, state);
    else if (e->limit != limit || e->state != state)
        status = ndm_i_fail(NDM_ERR_ARGUMENT, "the engine is known, with another limit or kind");
    ndm_i_books_unlock(governor);
    return status;
}

int ndm_governor_set_limit(ndm_governor *governor, int64_t engine, uint64_t limit)
{
    int status = ndm_i_check_call(governor, engine, limit);
    if (status != NDM_OK || (status = ndm_i_books_lock(governor)) != NDM_OK)
        return status;
    if (is_known(governor->books, (uint32_t)engine))
        status = set_limit(governor, (uint32_t)engine, limit, governor->books->engine[engine].state);
    else
        status = ndm_i_can_ever_fit(governor, (uint32_t)engine, 0);
    ndm_i_books_unlock(governor);
    return status;
}

int ndm_governor_set_ceiling(ndm_governor *governor, uint64_t ceiling, uint64_t headroom)
{
    int status = ndm_i_check_call(governor, 0, ceiling);
    if (status == NDM_OK && (ceiling == 0 || headroom > ceiling))
        status = ndm_i_fail(NDM_ERR_ARGUMENT, "the ceiling must be positive, and the headroom not above it");
    if (status != NDM_OK || (status = ndm_i_books_lock(governor)) != NDM_OK)
        return status;
    governor->books->ceiling = ceiling;
    governor->books->headroom = headroom;
    set_keeps(governor);
    ndm_i_books_settle(governor);
    ndm_i_notify(governor);
    ndm_i_books_unlock(governor);
    return NDM_OK;
}

/* ---- begin ---------------------------------------------------------------------------------------------- */

static int check_options(const ndm_governor_options *options)
{
    if (options->ceiling == 0 || options->ceiling > INT64_MAX || options->headroom > options->ceiling)
        return ndm_i_fail(NDM_ERR_ARGUMENT, "the ceiling must be positive, and the headroom not above it");
    if (options->warning == 0 || options->warning > options->critical || options->critical > options->emergency ||
        options->emergency > 1000 || options->hysteresis > 100)
        return ndm_i_fail(NDM_ERR_ARGUMENT, "thresholds must be positive and ascend");
    return NDM_OK;
}

static void set_options(ndm_i_books *books, const ndm_governor_options *options)
{
    books->ceiling = options->ceiling;
    books->headroom = options->headroom;
    books->thresholds[0] = options->warning;
    books->thresholds[1] = options->critical;
    books->thresholds[2] = options->emergency;
    books->hysteresis = options->hysteresis;
}

static void in_child(void *governor)
{
    if (!ndm_i_is_process(((ndm_governor *)governor)->process))
        ndm_i_governor_renew(governor);
}

static ndm_governor *governor_new(void)
{
    ndm_governor *governor = calloc(1, sizeof *governor);
    if (!governor || (governor->process = ndm_i_process()) == 0) {
        free(governor);
        ndm_i_fail(NDM_ERR_MEMORY, "no memory for a governor");
        return NULL;
    }
    governor->file.fd = -1;
    governor->patience = PATIENCE;
    pthread_mutex_init(&governor->lock, NULL);
    return governor;
}

static void listed(ndm_governor *governor)
{
    governor->fork = (ndm_i_fork_entry){.in_child = in_child, .context = governor, .lock = &governor->lock};
    ndm_i_fork_add(&governor->fork);
}

ndm_governor *ndm_governor_create(const ndm_governor_options *options)
{
    if (!options || check_options(options) != NDM_OK) {
        if (!options)
            ndm_i_fail(NDM_ERR_ARGUMENT, "options are needed");
        return NULL;
    }
    ndm_governor *governor = governor_new();
    if (!governor)
        return NULL;
    const size_t size = ROWS_AT + ndm_i_round_up(sizeof(ndm_i_row), 4096);
    if (!(governor->books = aligned_alloc(4096, size))) {
        free(governor);
        ndm_i_fail(NDM_ERR_MEMORY, "no memory for a governor's books");
        return NULL;
    }
    memset(governor->books, 0, size);
    governor->rows = (ndm_i_row *)((char *)governor->books + ROWS_AT);
    governor->count = 1;
    set_options(governor->books, options);
    ndm_i_row_claim(governor);
    listed(governor);
    return governor;
}

/* ---- shared --------------------------------------------------------------------------------------------- */

/* What the file says of itself. NDM_ERR_WAIT: nothing yet. */
static int check_file(const ndm_i_file *file)
{
    ndm_i_books head;
    if (file->capacity == 0)
        return NDM_ERR_WAIT;
    if (file->capacity < sizeof head)
        return ndm_i_fail_io(EINVAL, "not the file of a governor");
    const int status = ndm_i_file_load(file, 0, &head, sizeof head);
    if (status != NDM_OK)
        return status;
    if (head.magic == 0 && head.layout <= NDM_I_LAYOUT && head.ceiling == 0 && head.known == 0 &&
        file->capacity == FILE_SIZE)
        return NDM_ERR_WAIT; /* who made it was killed before it was complete */
    if (head.magic != NDM_I_BOOKS_MAGIC)
        return ndm_i_fail_io(EINVAL, "not the file of a governor");
    if (head.layout != NDM_I_LAYOUT || head.engines != NDM_I_ENGINES || head.rows != NDM_I_ROWS ||
        head.row_size != sizeof(ndm_i_row) || head.size != FILE_SIZE)
        return ndm_i_fail_io(EINVAL, "the governor's file is of another version");
    return file->capacity == FILE_SIZE ? NDM_OK : ndm_i_fail_io(EUCLEAN, "the governor's file was cut short");
}

/* Map the file, and get its blocks: a store then meets no full disk. */
static int map(ndm_governor *governor, bool fresh)
{
    ndm_i_file *file = &governor->file;
    const int status = ndm_i_file_start(file, FILE_SIZE, FILE_SIZE);
    if (status != NDM_OK)
        return status;
    const int refused = fresh ? ndm_i_file_get_blocks(file) : ndm_i_file_allocate(file, 0, FILE_SIZE); /* others use it */
    if (refused)
        return ndm_i_fail_io(refused, "no room for the governor's file");
    governor->books = (ndm_i_books *)file->mapping->base;
    governor->rows = (ndm_i_row *)(file->mapping->base + ROWS_AT);
    governor->count = NDM_I_ROWS;
    return NDM_OK;
}

static void write_head(ndm_i_books *books)
{
    books->layout = NDM_I_LAYOUT;
    books->engines = NDM_I_ENGINES;
    books->rows = NDM_I_ROWS;
    books->row_size = sizeof(ndm_i_row);
    books->size = FILE_SIZE;
    atomic_thread_fence(memory_order_seq_cst);
    books->magic = NDM_I_BOOKS_MAGIC;
}

static bool in_use(const ndm_governor *governor)
{
    for (uint32_t i = 0; i < governor->count; i++)
        if (governor->rows[i].claimed)
            return true;
    return false;
}

/* What is asked for has to be what those go by who use the file already. Where nobody does, it holds from now on. */
static int agree(ndm_governor *governor, const ndm_governor_options *options)
{
    ndm_i_books *books = governor->books;
    if (!in_use(governor)) {
        memset(books->engine, 0, sizeof books->engine);
        books->known = 0;
        ndm_i_books_forget(books);
        set_options(books, options);
        books->dirty = 1; /* the lock is held */
        return NDM_OK;
    }
    if (options->adopt ||
        (books->ceiling == options->ceiling && books->headroom == options->headroom &&
         books->thresholds[0] == options->warning && books->thresholds[1] == options->critical &&
         books->thresholds[2] == options->emergency && books->hysteresis == options->hysteresis))
        return NDM_OK;
    return ndm_i_fail(NDM_ERR_ARGUMENT, "the file is in use with another ceiling, headroom or thresholds");
}

/* The file's first byte is locked: nobody is making it, nobody changes it. */
static int begin_shared(ndm_governor *governor, const ndm_governor_options *options)
{
    governor->file.capacity = ndm_i_file_size(&governor->file);
    int status = check_file(&governor->file);
    const bool fresh = status == NDM_ERR_WAIT;
    if (fresh && !options)
        return ndm_i_fail_io(EINVAL, "not the file of a governor");
    if (!fresh && status != NDM_OK)
        return status;
    if ((status = map(governor, fresh)) != NDM_OK) {
        if (fresh)
            ndm_i_file_shrink(&governor->file, 0);
        return status;
    }
    if (fresh)
        write_head(governor->books); /* join() sets the options */
    return NDM_OK;
}

static int join(ndm_governor *governor, const ndm_governor_options *options)
{
    int status = ndm_i_books_lock(governor); /* which repairs */
    if (status != NDM_OK)
        return status;
    if (ndm_i_books_check(governor) != 0)
        status = ndm_i_fail_io(EUCLEAN, "the counters in the governor's file contradict each other");
    if (status == NDM_OK)
        ndm_i_rows_reap(governor);
    if (status == NDM_OK && options && (status = agree(governor, options)) == NDM_OK)
        status = ndm_i_row_claim(governor);
    ndm_i_books_unlock(governor);
    return status;
}

ndm_governor *ndm_governor_open(const char *path, const ndm_governor_options *options)
{
    if (options && check_options(options) != NDM_OK)
        return NULL;
    ndm_governor *governor = governor_new();
    if (!governor)
        return NULL;
    governor->shared = true;
    listed(governor); /* before there is anything that a forked child could inherit */
    if (ndm_i_file_open(&governor->file, path, options != NULL, NDM_I_LOCK_NONE) != NDM_OK)
        goto fail;
    const int refused = ndm_i_file_await_byte(&governor->file, 0, governor->patience);
    if (refused) {
        ndm_i_fail_io(refused, "cannot lock the governor's file");
        goto fail;
    }
    const int status = begin_shared(governor, options);
    ndm_i_file_lock_byte(&governor->file, 0, false);
    if (status != NDM_OK)
        goto fail;
    /* A mapping keeps its open file, with the locks of that, also in a forked child. So the claim is another open file's. */
    ndm_i_fork_bar();
    const bool reopened = ndm_i_file_reopen(&governor->file);
    ndm_i_fork_let();
    if (!reopened)
        ndm_i_fail_io(errno, "cannot open the file again");
    if (!reopened || join(governor, options) != NDM_OK)
        goto fail;
    return governor;

fail:
    ndm_i_fork_remove(&governor->fork);
    ndm_i_file_close(&governor->file, NULL);
    free(governor);
    return NULL;
}

/* ---- end ------------------------------------------------------------------------------------------------ */

void ndm_governor_destroy(ndm_governor *governor)
{
    if (!governor)
        return;
    ndm_i_number_retire(governor);
    ndm_i_fork_remove(&governor->fork);
    if (governor->shared) {
        /* In a raw clone() the row is the parent's. */
        if (ndm_i_is_process(governor->process) && atomic_load(&governor->row) && ndm_i_books_lock(governor) == NDM_OK) {
            ndm_i_row_leave(governor);
            ndm_i_books_unlock(governor);
        }
        ndm_i_file_close(&governor->file, NULL);
    } else {
        free(governor->books);
    }
    pthread_mutex_destroy(&governor->lock);
    free(governor);
}

int64_t ndm_governor_epoch(ndm_governor *governor)
{
    if (!ndm_i_is_process(governor->process) && ndm_i_books_lock(governor) == NDM_OK)
        ndm_i_books_unlock(governor); /* a child that no handler saw: it begins anew */
    return (int64_t)governor->epoch;
}
