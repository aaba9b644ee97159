/* See writer.h. */
#define _GNU_SOURCE
#include "store/writer.h"

#include "os/bits.h"
#include "os/bytes.h"
#include "os/fork.h"
#include "os/owner.h"
#include "os/status.h"
#include "store/salvage.h"

#include <assert.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>

#define GRAIN NDM_I_GRAIN

/* In grains. A kick of 8 MiB keeps the disk busy; write-back of one grain at a time does not. Drops are smaller, because
 * the owner may be waiting for one. The newest grains are still being filled. A limit below LEAST would leave no room
 * for a kick behind them. */
enum { KICK = 16, DROP = 4, NEWEST = 2, LEAST = 8, FIRST_QUEUE = 256 };

/* What flush and evict wait for at once, in grains: 256 MiB on ext4 in pieces of 8 MiB 1250 MiB/s, of 32 MiB 1450-1800,
 * all at once 1600-2000. What is under way when the disk fails may be lost to reclaim. */
enum { PIECE = 64 };

int ndm_i_writer_init(ndm_i_writer *writer, ndm_i_file *file, ndm_i_grains *grains, const _Atomic uint64_t *storing,
                      uint64_t limit)
{
    *writer = (ndm_i_writer){.file = file, .grains = grains, .storing = storing, .limit = NDM_I_UNLIMITED};
    pthread_mutex_init(&writer->disk, NULL);
    if (limit == NDM_I_UNLIMITED || file->in_memory) /* what lives in memory cannot be dropped from it */
        return NDM_OK;
    writer->queue = malloc(FIRST_QUEUE * sizeof *writer->queue);
    if (!writer->queue)
        return ndm_i_fail(NDM_ERR_MEMORY, "no memory for the writer's queue");
    writer->queue_room = FIRST_QUEUE;
    pthread_mutex_init(&writer->lock, NULL);
    pthread_cond_init(&writer->work, NULL);
    pthread_cond_init(&writer->room, NULL);
    writer->limit = limit / GRAIN < LEAST ? LEAST : limit / GRAIN;
    return NDM_OK;
}

void ndm_i_writer_leave_in_child(ndm_i_writer *writer)
{
    ndm_i_mapping_unref(atomic_exchange(&writer->looking, NULL));
}

/* The thread stayed with the parent, and may have been in the midst of something. */
static void fini_in_child(ndm_i_writer *writer)
{
    ndm_i_writer_leave_in_child(writer);
    if (pthread_mutex_trylock(&writer->lock) == 0)
        free(writer->queue);
    writer->queue = NULL;
}

void ndm_i_writer_fini(ndm_i_writer *writer)
{
    if (!writer->queue) /* it has no limit, or was never started */
        return;
    if (!ndm_i_is_process(writer->file->process)) {
        fini_in_child(writer);
        return;
    }
    pthread_mutex_lock(&writer->lock);
    writer->stopping = true;
    pthread_cond_signal(&writer->work);
    pthread_mutex_unlock(&writer->lock);
    if (writer->running)
        pthread_join(writer->thread, NULL);
    pthread_cond_destroy(&writer->room);
    pthread_cond_destroy(&writer->work);
    pthread_mutex_destroy(&writer->disk);
    pthread_mutex_destroy(&writer->lock);
    free(writer->queue);
    writer->queue = NULL;
    writer->limit = NDM_I_UNLIMITED;
}

/* ---- the queue, with the lock held ---------------------------------------------------------------------- */

static uint32_t *entry(const ndm_i_writer *writer, uint64_t at) { return &writer->queue[at & (writer->queue_room - 1)]; }

static bool queue_grow(ndm_i_writer *writer)
{
    uint32_t *wide = malloc(writer->queue_room * 2 * sizeof *wide);
    if (!wide)
        return false;
    for (uint64_t at = writer->head; at < writer->tail; at++)
        wide[at & (writer->queue_room * 2 - 1)] = *entry(writer, at);
    free(writer->queue);
    writer->queue = wide;
    writer->queue_room *= 2;
    return true;
}

/* false: no memory; the grain stays in RAM until it is admitted again. */
static bool push(ndm_i_writer *writer, uint64_t grain)
{
    if (writer->tail - writer->head == writer->queue_room && !queue_grow(writer))
        return false;
    *entry(writer, writer->tail++) = (uint32_t)grain;
    ndm_i_grain_mark(writer->grains, grain, NDM_I_QUEUED);
    return true;
}

static bool is_queued(const ndm_i_writer *writer, uint64_t grain)
{
    return ndm_i_grain_is(writer->grains, grain, NDM_I_QUEUED);
}

void ndm_i_writer_forget(ndm_i_writer *writer, uint64_t first, uint64_t last)
{
    for (uint64_t grain = first; grain < last; grain++) {
        assert(!is_queued(writer, grain) || writer->resident > 0);
        if (is_queued(writer, grain))
            writer->resident--; /* its entry is stale now, and will be skipped */
        ndm_i_grain_unmark(writer->grains, grain, NDM_I_QUEUED | NDM_I_RECENT);
    }
}

/* Take a run of neighbouring grains, at most `most`, from `*at` on; skip stale entries. Gives its length. */
static uint64_t take_run(const ndm_i_writer *writer, uint64_t *at, uint64_t stop, uint64_t most, uint64_t *first)
{
    uint64_t count = 0;
    for (; *at < stop && count < most; (*at)++) {
        const uint64_t grain = *entry(writer, *at);
        if (!is_queued(writer, grain))
            continue;
        if (count == 0)
            *first = grain;
        else if (grain != *first + count)
            break;
        count++;
    }
    return count;
}

/* ---- the two jobs, with the lock held, let go while the disk works -------------------------------------- */

/* Start write-back of grains that came to RAM since the last kick. */
static void kick(ndm_i_writer *writer, uint64_t stop)
{
    uint64_t first = 0;
    const uint64_t count = take_run(writer, &writer->kicked, stop, KICK, &first);
    if (count == 0)
        return;
    writer->written_back += count * GRAIN;
    pthread_mutex_unlock(&writer->lock);
    ndm_i_file_write_back(writer->file, first * GRAIN, (first + count) * GRAIN, false); /* who waits hears of errors */
    pthread_mutex_lock(&writer->lock);
}

/* A grain that was read since it was queued goes to the end of the queue instead. */
static void spare_recent(ndm_i_writer *writer, uint64_t stop)
{
    while (writer->head < stop) {
        const uint64_t grain = *entry(writer, writer->head);
        if (!is_queued(writer, grain)) {
            writer->head++;
            continue;
        }
        if (!ndm_i_grain_is(writer->grains, grain, NDM_I_RECENT))
            return;
        ndm_i_grain_unmark(writer->grains, grain, NDM_I_RECENT);
        writer->head++;
        push(writer, grain); /* has room: an entry was just taken */
    }
}

/* Wait for the oldest grains to be on disk, and drop them. */
static void drop(ndm_i_writer *writer, uint64_t stop)
{
    uint64_t first = 0;
    spare_recent(writer, stop);
    uint64_t count = take_run(writer, &writer->head, stop, DROP, &first), last = first + count;
    if (writer->kicked < writer->head)
        writer->kicked = writer->head;
    if (count == 0)
        return;
    ndm_i_grains_widen(writer->grains, &first, &last, ndm_i_grains_end(writer->file->capacity));
    count = 0;
    for (uint64_t grain = first; grain < last; grain++) {
        count += is_queued(writer, grain); /* of those besides the run the entries are stale now */
        ndm_i_grain_unmark(writer->grains, grain, NDM_I_QUEUED);
        if (ndm_i_grain_state(writer->grains, grain) >= NDM_I_READY)
            ndm_i_grain_set_state(writer->grains, grain, NDM_I_DROPPED);
    }
    ndm_i_fork_bar();
    ndm_i_mapping *mapping = writer->file->mapping;
    ndm_i_mapping_ref(mapping);
    atomic_store(&writer->looking, mapping);
    ndm_i_fork_let();
    const uint64_t start = first * GRAIN;
    const uint64_t end = ndm_i_min(last * GRAIN, writer->file->capacity);
    pthread_mutex_unlock(&writer->lock);
    pthread_mutex_lock(&writer->disk);
    int refused = end > start ? ndm_i_file_write_back(writer->file, start, end, true) : 0;
    if (refused)
        atomic_store(&writer->error, refused);
    else if (end > start)
        ndm_i_file_drop(writer->file, mapping, start, end);
    pthread_mutex_unlock(&writer->disk);
    ndm_i_fork_bar();
    atomic_store(&writer->looking, NULL);
    ndm_i_mapping_unref(mapping);
    ndm_i_fork_let();
    pthread_mutex_lock(&writer->lock);
    for (uint64_t grain = first; refused && grain < last; grain++) /* what did not reach the disk stays */
        if (!is_queued(writer, grain) && push(writer, grain))
            writer->resident++;
    assert(writer->resident >= count && writer->head <= writer->kicked && writer->kicked <= writer->tail);
    writer->resident -= count;
    atomic_fetch_add(&writer->drops, 1);
    pthread_cond_broadcast(&writer->room);
}

/* One step of work; false if there is none. */
static bool step(ndm_i_writer *writer)
{
    const uint64_t settled = writer->tail > writer->head + NEWEST ? writer->tail - NEWEST : writer->head;
    const uint64_t enough = ndm_i_min(writer->limit / 4, KICK);
    if (writer->kicked + enough <= settled)
        kick(writer, settled);
    else if (writer->resident > writer->limit - writer->limit / 4 && writer->head < settled)
        drop(writer, settled);
    else
        return false;
    return true;
}

static void *work(void *argument)
{
    ndm_i_writer *writer = argument;
    pthread_setname_np(pthread_self(), "nodedb-writer");
    pthread_mutex_lock(&writer->lock);
    while (!writer->stopping) {
        if (atomic_load(&writer->error) || !step(writer)) {
            pthread_cond_broadcast(&writer->room);
            pthread_cond_wait(&writer->work, &writer->lock);
        }
    }
    pthread_mutex_unlock(&writer->lock);
    return NULL;
}

/* Signals are for the threads that expect them. */
static bool start_thread(ndm_i_writer *writer)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    writer->running = pthread_create(&writer->thread, NULL, work, writer) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return writer->running;
}

/* ---- the owner's side ----------------------------------------------------------------------------------- */

/* In pieces, the next one started while the disk works on one. After a failure nothing else is started: `*from` is where
 * the piece that failed begins. */
static int write_back(const ndm_i_file *file, uint64_t start, uint64_t end, uint64_t *from)
{
    for (; start < end; start += PIECE * GRAIN) {
        const uint64_t next = start + PIECE * GRAIN, after = next + PIECE * GRAIN;
        if (next < end)
            ndm_i_file_write_back(file, next, after < end ? after : end, false);
        int refused = ndm_i_file_write_back(file, start, next < end ? next : end, true);
        *from = start;
        if (refused)
            return refused;
    }
    return 0;
}

int ndm_i_writer_settle(ndm_i_writer *writer, uint64_t start, uint64_t end, bool drop)
{
    uint64_t from = start;
    pthread_mutex_lock(&writer->disk);
    int refused = atomic_load(&writer->error); /* it stays until all is salvaged, and keeps the thread from its work */
    if (!refused && !writer->suspect)
        refused = write_back(writer->file, start, end, &from);
    if (refused || writer->suspect) {
        int lost = 0;
        const int failed = ndm_i_salvage(writer->file, writer->grains, writer->storing, from, &lost);
        writer->suspect = failed != 0;
        refused = refused ? refused : failed;
        atomic_store(&writer->error, lost); /* the next call says it again */
    }
    if (!refused && drop)
        ndm_i_file_drop(writer->file, writer->file->mapping, start, end);
    pthread_mutex_unlock(&writer->disk);
    return refused;
}

bool ndm_i_writer_let(ndm_i_writer *writer)
{
    if (!writer->gate || !writer->gate->lets || writer->awaited)
        return false;
    writer->writing++;
    return ndm_i_gate_let(writer->gate);
}

void ndm_i_writer_come_back(ndm_i_writer *writer, bool let)
{
    ndm_i_gate_come_back(writer->gate, let);
    if (let && --writer->writing == 0)
        ndm_i_gate_wake(writer->gate);
}

void ndm_i_writer_settle_ahead(ndm_i_writer *writer, uint64_t start, uint64_t end)
{
    uint64_t from;
    const bool let = ndm_i_gate_let(writer->gate);
    if (let) {
        pthread_mutex_lock(&writer->disk);
        const int refused = write_back(writer->file, start, end, &from);
        if (refused)
            atomic_store(&writer->error, refused);
        pthread_mutex_unlock(&writer->disk);
    }
    ndm_i_gate_come_back(writer->gate, let);
    for (; writer->writing > 0; writer->awaited = false) {
        writer->awaited = true;
        ndm_i_gate_wait(writer->gate);
    }
}

/* Has whoever brings more to RAM to wait for the thread? */
static bool is_full(const ndm_i_writer *writer)
{
    return writer->resident > writer->limit && writer->tail > writer->head + NEWEST && !atomic_load(&writer->error);
}

void ndm_i_writer_admit(ndm_i_writer *writer, uint64_t first, uint64_t last)
{
    bool let = false;
    if (!ndm_i_writer_is_limited(writer))
        return;
    pthread_mutex_lock(&writer->lock);
    const uint64_t before = writer->resident;
    for (uint64_t grain = first; grain < last; grain++)
        if (!is_queued(writer, grain) && push(writer, grain))
            writer->resident++;
    /* Where many threads use the region, none waits for what others have brought. */
    const bool waits = writer->resident > before || !writer->gate || !writer->gate->shared;
    if (writer->resident > writer->limit / 2) {
        if (writer->running || start_thread(writer)) {
            pthread_cond_signal(&writer->work);
            let = waits && is_full(writer) && ndm_i_gate_let(writer->gate);
            while (waits && is_full(writer))
                pthread_cond_wait(&writer->room, &writer->lock);
        } else {
            while (writer->resident > writer->limit && !atomic_load(&writer->error) && step(writer))
                ; /* no thread can be had: the owner does it */
        }
    }
    pthread_mutex_unlock(&writer->lock);
    ndm_i_gate_come_back(writer->gate, let);
}

/* ---- checking ------------------------------------------------------------------------------------------- */

/* Each QUEUED grain stands in the queue, and is counted; the thread may be dropping others. */
uint64_t ndm_i_writer_check(ndm_i_writer *writer)
{
    if (!ndm_i_writer_is_limited(writer))
        return 0;
    uint64_t broken = 0, queued = 0, found = 0;
    pthread_mutex_lock(&writer->lock);
    broken += writer->head > writer->kicked || writer->kicked > writer->tail;
    broken += !ndm_i_is_power_of_two(writer->queue_room) || writer->tail - writer->head > writer->queue_room;
    uint8_t *seen = calloc(writer->grains->room + 1, 1);
    for (uint64_t grain = 0; grain < writer->grains->room; grain++)
        queued += is_queued(writer, grain);
    for (uint64_t at = writer->head; seen && broken == 0 && at < writer->tail; at++) {
        const uint64_t grain = *entry(writer, at);
        if (!is_queued(writer, grain) || seen[grain])
            continue;
        seen[grain] = 1;
        found++;
    }
    broken += seen && broken == 0 && found != queued;
    broken += writer->resident < queued;
    pthread_mutex_unlock(&writer->lock);
    free(seen);
    return broken;
}
