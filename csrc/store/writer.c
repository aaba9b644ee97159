/* The background writer: how much of the file stays in RAM. See grains.h. */
#define _GNU_SOURCE
#include "store/grains.h"

#include "os/status.h"

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

int ndm_i_cache_init(ndm_i_cache *cache, const ndm_i_backing *file, uint64_t limit)
{
    if (limit == NDM_I_UNLIMITED || file->in_memory) /* what lives in memory cannot be dropped from it */
        return NDM_OK;
    cache->queue = malloc(FIRST_QUEUE * sizeof *cache->queue);
    if (!cache->queue)
        return ndm_i_fail(NDM_ERR_MEMORY, "no memory for the cache's queue");
    cache->queue_room = FIRST_QUEUE;
    pthread_mutex_init(&cache->lock, NULL);
    pthread_mutex_init(&cache->disk, NULL);
    pthread_cond_init(&cache->work, NULL);
    pthread_cond_init(&cache->room, NULL);
    cache->limit = limit / GRAIN < LEAST ? LEAST : limit / GRAIN;
    return NDM_OK;
}

void ndm_i_cache_fini(ndm_i_cache *cache)
{
    if (cache->limit == NDM_I_UNLIMITED)
        return;
    pthread_mutex_lock(&cache->lock);
    cache->stopping = true;
    pthread_cond_signal(&cache->work);
    pthread_mutex_unlock(&cache->lock);
    if (cache->running)
        pthread_join(cache->thread, NULL);
    pthread_cond_destroy(&cache->room);
    pthread_cond_destroy(&cache->work);
    pthread_mutex_destroy(&cache->disk);
    pthread_mutex_destroy(&cache->lock);
    free(cache->queue);
    cache->limit = NDM_I_UNLIMITED;
}

/* ---- the queue, with the lock held ---------------------------------------------------------------------- */

static uint32_t *entry(const ndm_i_cache *cache, uint64_t at) { return &cache->queue[at & (cache->queue_room - 1)]; }

static bool queue_grow(ndm_i_cache *cache)
{
    uint32_t *wide = malloc(cache->queue_room * 2 * sizeof *wide);
    if (!wide)
        return false;
    for (uint64_t at = cache->head; at < cache->tail; at++)
        wide[at & (cache->queue_room * 2 - 1)] = *entry(cache, at);
    free(cache->queue);
    cache->queue = wide;
    cache->queue_room *= 2;
    return true;
}

/* false: no memory; the grain stays in RAM until it is admitted again. */
static bool push(ndm_i_grains *grains, uint64_t grain)
{
    ndm_i_cache *cache = &grains->cache;
    if (cache->tail - cache->head == cache->queue_room && !queue_grow(cache))
        return false;
    *entry(cache, cache->tail++) = (uint32_t)grain;
    atomic_fetch_or(&grains->marks[grain], NDM_I_QUEUED);
    return true;
}

static bool is_queued(const ndm_i_grains *grains, uint64_t grain)
{
    return grain < grains->room && atomic_load_explicit(&grains->marks[grain], memory_order_relaxed) & NDM_I_QUEUED;
}

void ndm_i_cache_forget(ndm_i_grains *grains, uint64_t first, uint64_t last)
{
    for (uint64_t grain = first; grain < last; grain++) {
        if (is_queued(grains, grain))
            grains->cache.resident--; /* its entry is stale now, and will be skipped */
        atomic_store(&grains->marks[grain], 0);
    }
}

/* Take a run of neighbouring grains, at most `most`, from `*at` on; skip stale entries. Gives its length. */
static uint64_t take_run(const ndm_i_grains *grains, uint64_t *at, uint64_t stop, uint64_t most, uint64_t *first)
{
    const ndm_i_cache *cache = &grains->cache;
    uint64_t count = 0;
    for (; *at < stop && count < most; (*at)++) {
        const uint64_t grain = *entry(cache, *at);
        if (!is_queued(grains, grain))
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
static void kick(ndm_i_grains *grains, uint64_t stop)
{
    ndm_i_cache *cache = &grains->cache;
    uint64_t first = 0;
    const uint64_t count = take_run(grains, &cache->kicked, stop, KICK, &first);
    if (count == 0)
        return;
    cache->written_back += count * GRAIN;
    pthread_mutex_unlock(&cache->lock);
    ndm_i_backing_write_back(grains->file, first * GRAIN, (first + count) * GRAIN, false); /* who waits hears of errors */
    pthread_mutex_lock(&cache->lock);
}

/* A grain that was read since it was queued goes to the end of the queue instead. */
static void spare_recent(ndm_i_grains *grains, uint64_t stop)
{
    ndm_i_cache *cache = &grains->cache;
    while (cache->head < stop) {
        const uint64_t grain = *entry(cache, cache->head);
        if (!is_queued(grains, grain)) {
            cache->head++;
            continue;
        }
        if (!(atomic_load(&grains->marks[grain]) & NDM_I_RECENT))
            return;
        atomic_fetch_and(&grains->marks[grain], (uint8_t)~NDM_I_RECENT);
        cache->head++;
        push(grains, grain); /* has room: an entry was just taken */
    }
}

/* Wait for the oldest grains to be on disk, and drop them. */
static void drop(ndm_i_grains *grains, uint64_t stop)
{
    ndm_i_cache *cache = &grains->cache;
    uint64_t first = 0;
    spare_recent(grains, stop);
    const uint64_t count = take_run(grains, &cache->head, stop, DROP, &first);
    if (cache->kicked < cache->head)
        cache->kicked = cache->head;
    if (count == 0)
        return;
    for (uint64_t grain = first; grain < first + count; grain++) {
        atomic_fetch_and(&grains->marks[grain], (uint8_t)~NDM_I_QUEUED);
        if (atomic_load(&grains->states[grain]) >= NDM_I_READY)
            atomic_store(&grains->states[grain], NDM_I_DROPPED);
    }
    ndm_i_mapping *mapping = grains->file->mapping;
    ndm_i_mapping_ref(mapping);
    const uint64_t start = first * GRAIN;
    const uint64_t end = (first + count) * GRAIN < grains->file->capacity ? (first + count) * GRAIN : grains->file->capacity;
    pthread_mutex_unlock(&cache->lock);
    pthread_mutex_lock(&cache->disk);
    int refused = end > start ? ndm_i_backing_write_back(grains->file, start, end, true) : 0;
    if (refused)
        atomic_store(&cache->error, refused);
    else if (end > start)
        ndm_i_backing_drop(grains->file, mapping, start, end);
    pthread_mutex_unlock(&cache->disk);
    ndm_i_mapping_unref(mapping);
    pthread_mutex_lock(&cache->lock);
    for (uint64_t grain = first; refused && grain < first + count; grain++) /* what did not reach the disk stays */
        if (!is_queued(grains, grain) && push(grains, grain))
            cache->resident++;
    cache->resident -= count;
    atomic_fetch_add(&cache->drops, 1);
    pthread_cond_signal(&cache->room);
}

/* One step of work; false if there is none. */
static bool step(ndm_i_grains *grains)
{
    ndm_i_cache *cache = &grains->cache;
    const uint64_t settled = cache->tail > cache->head + NEWEST ? cache->tail - NEWEST : cache->head;
    const uint64_t enough = cache->limit / 4 < KICK ? cache->limit / 4 : KICK;
    if (cache->kicked + enough <= settled)
        kick(grains, settled);
    else if (cache->resident > cache->limit - cache->limit / 4 && cache->head < settled)
        drop(grains, settled);
    else
        return false;
    return true;
}

static void *work(void *argument)
{
    ndm_i_grains *grains = argument;
    ndm_i_cache *cache = &grains->cache;
    pthread_setname_np(pthread_self(), "nodedb-writer");
    pthread_mutex_lock(&cache->lock);
    while (!cache->stopping) {
        if (atomic_load(&cache->error) || !step(grains)) {
            pthread_cond_signal(&cache->room);
            pthread_cond_wait(&cache->work, &cache->lock);
        }
    }
    pthread_mutex_unlock(&cache->lock);
    return NULL;
}

/* Signals are for the threads that expect them. */
static bool start_thread(ndm_i_grains *grains)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    grains->cache.running = pthread_create(&grains->cache.thread, NULL, work, grains) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return grains->cache.running;
}

/* ---- the owner's side ----------------------------------------------------------------------------------- */

/* In pieces, the next one started while the disk works on one. After a failure nothing else is started: `*from` is where
 * the piece that failed begins. */
static int write_back(const ndm_i_backing *file, uint64_t start, uint64_t end, uint64_t *from)
{
    for (; start < end; start += PIECE * GRAIN) {
        const uint64_t next = start + PIECE * GRAIN, after = next + PIECE * GRAIN;
        if (next < end)
            ndm_i_backing_write_back(file, next, after < end ? after : end, false);
        int refused = ndm_i_backing_write_back(file, start, next < end ? next : end, true);
        *from = start;
        if (refused)
            return refused;
    }
    return 0;
}

int ndm_i_cache_settle(ndm_i_grains *grains, uint64_t start, uint64_t end, bool drop)
{
    ndm_i_cache *cache = &grains->cache;
    const bool shared = cache->limit != NDM_I_UNLIMITED;
    uint64_t from = start;
    if (shared)
        pthread_mutex_lock(&cache->disk);
    int refused = atomic_load(&cache->error); /* it stays until all is rescued, and keeps the thread from its work */
    if (!refused && !cache->suspect)
        refused = write_back(grains->file, start, end, &from);
    if (refused || cache->suspect) {
        int lost = 0;
        const int failed = ndm_i_rescue(grains, from, &lost);
        cache->suspect = failed != 0;
        refused = refused ? refused : failed;
        atomic_store(&cache->error, lost); /* the next call says it again */
    }
    if (!refused && drop)
        ndm_i_backing_drop(grains->file, grains->file->mapping, start, end);
    if (shared)
        pthread_mutex_unlock(&cache->disk);
    return refused;
}

void ndm_i_cache_admit(ndm_i_grains *grains, uint64_t first, uint64_t last)
{
    ndm_i_cache *cache = &grains->cache;
    if (cache->limit == NDM_I_UNLIMITED)
        return;
    pthread_mutex_lock(&cache->lock);
    for (uint64_t grain = first; grain < last; grain++)
        if (!is_queued(grains, grain) && push(grains, grain))
            cache->resident++;
    if (cache->resident > cache->limit / 2) {
        if (cache->running || start_thread(grains)) {
            pthread_cond_signal(&cache->work);
            while (cache->resident > cache->limit && cache->tail > cache->head + NEWEST && !atomic_load(&cache->error))
                pthread_cond_wait(&cache->room, &cache->lock);
        } else {
            while (cache->resident > cache->limit && !atomic_load(&cache->error) && step(grains))
                ; /* no thread can be had: the owner does it */
        }
    }
    pthread_mutex_unlock(&cache->lock);
}
