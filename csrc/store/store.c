/* See store.h. */
#define _GNU_SOURCE
#include "store/store.h"

#include "os/bits.h"
#include "os/bytes.h"
#include "os/residency.h"
#include "os/status.h"
#include "store/blocks.h"
#include "store/direct.h"
#include "store/strays.h"
#include "store/warm.h"
#include "store/watch.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define GRAIN NDM_I_GRAIN

/* ---- thresholds, each with its reason; ext4 figures, us per MiB, Linux 6.18, benchmarks/native/write_paths.c ---- */

/* tmpfs zeroes whole pages unless pwrite fills them: 4 KiB by pwrite 408, by memcpy 530-680. Without large folios (ext2,
 * ext3, older kernels) each page of a zeroed grain faults by itself, and pwrite wins from a page up, too. */
#define PWRITE_FROM_SMALL_FOLIOS ((uint64_t)4 << 10)

/* Where pages may stay mapped, values below are stored and copied out through the mapping: a store of 64 KiB takes 4.2 us
 * there, by pwrite 7.7, and a later view finds its pages mapped. */
#define DIRECT_FROM_MAPPED ((uint64_t)256 << 10)

/* For values that are in RAM madvise is wasted: 0.6 us for 4 KiB, 1.5 for 64 KiB, 17 for 1 MiB. For those that the
 * kernel has dropped by itself, fetching 16 KiB takes 117 us with it and 230 without, 64 KiB 157 and 1092. (What we have
 * dropped is known, and fetched in one go whatever its size.) */
#define FETCH_FROM ((uint64_t)64 << 10)

/* What a move has mapped of a large value is forgotten each time that so much has been moved. */
#define MOVE_STEP ((uint64_t)2 << 20)

/* ---- size ----------------------------------------------------------------------------------------------- */

/* The writer's thread looks at the table. */
static int make_room(ndm_i_store *store, uint64_t count)
{
    ndm_i_writer_lock(&store->writer);
    const bool done = ndm_i_grains_reserve(&store->grains, count);
    ndm_i_writer_unlock(&store->writer);
    return done ? NDM_OK : ndm_i_fail(NDM_ERR_MEMORY, "no memory for grain states");
}

int ndm_i_store_init(ndm_i_store *store, ndm_i_file *file, const _Atomic uint64_t *storing, uint64_t cache_limit,
                     bool keep_mapped)
{
    *store = (ndm_i_store){.file = file, .writer.limit = NDM_I_UNLIMITED, .seen = calloc(1, sizeof *store->seen)};
    store->direct_from = keep_mapped ? DIRECT_FROM_MAPPED : NDM_I_LARGE;
    store->pwrite_from = file->large_folios ? store->direct_from : PWRITE_FROM_SMALL_FOLIOS;
    store->grains.huge_folios = file->large_folios;
    store->forget_from = keep_mapped ? UINT64_MAX : NDM_I_LARGE;
    int status = store->seen ? make_room(store, ndm_i_grains_end(file->capacity)) : ndm_i_fail(NDM_ERR_MEMORY, "no memory for the store");
    if (status == NDM_OK)
        status = ndm_i_writer_init(&store->writer, file, &store->grains, storing, cache_limit);
    if (status != NDM_OK)
        ndm_i_store_fini(store);
    return status;
}

void ndm_i_store_fini(ndm_i_store *store)
{
    ndm_i_writer_fini(&store->writer);
    ndm_i_grains_fini(&store->grains);
    free(store->seen);
    store->seen = NULL;
}

/* Where the folio that the file's end cuts has to have blocks up to, once the file is longer, lest a store to it needs some. */
static uint64_t end_of_cut(const ndm_i_store *store, uint64_t old)
{
    if (old % NDM_I_HUGE > 0 && atomic_load(store->writer.storing) > 0 && ndm_i_grains_are_wide(&store->grains, old / GRAIN))
        return ndm_i_round_up(old, NDM_I_HUGE);
    const bool whole = old % GRAIN > 0 && ndm_i_grain_state(&store->grains, old / GRAIN) >= NDM_I_READY;
    return whole ? ndm_i_round_up(old, GRAIN) : old;
}

/* The file has grown. What the old end cut has blocks up to there only: its grain, and a folio around that. 0 or errno. */
static int mend_cut(ndm_i_store *store, uint64_t old)
{
    ndm_i_file *file = store->file;
    const uint64_t grain = old / GRAIN, rest = ndm_i_min(ndm_i_grains_end(old) * GRAIN, file->capacity);
    if (old % NDM_I_HUGE > 0 && atomic_load(store->writer.storing) == 0 && ndm_i_grains_are_wide(&store->grains, grain)) {
        ndm_i_writer_lock(&store->writer);
        ndm_i_grains_doubt(&store->grains, grain, grain + 1);
        ndm_i_writer_unlock(&store->writer);
    }
    const uint64_t end = ndm_i_min(end_of_cut(store, old), file->capacity);
    const bool whole = old % GRAIN > 0 && ndm_i_grain_state(&store->grains, grain) >= NDM_I_READY;
    const int refused = end > old ? ndm_i_file_allocate(file, old, end) : 0;
    return refused || !whole ? refused : ndm_i_file_write(file, NULL, rest - old, old);
}

int ndm_i_store_grow(ndm_i_store *store, uint64_t needed, uint64_t wanted, uint64_t ceiling)
{
    ndm_i_file *file = store->file;
    const uint64_t old = file->capacity;
    int status = make_room(store, ndm_i_grains_end(wanted));
    if (status != NDM_OK)
        return status;
    /* First: other threads may be storing through views, and may need the blocks as soon as the file is longer. */
    const uint64_t end = ndm_i_min(end_of_cut(store, old), wanted);
    int refused = end > old && file->keeps_blocks ? ndm_i_file_allocate_beyond(file, old, end) : 0;
    if (!refused) {
        ndm_i_writer_lock(&store->writer); /* the thread looks at the mapping and the capacity */
        status = ndm_i_file_grow(file, needed, wanted, ceiling);
        ndm_i_writer_unlock(&store->writer);
        refused = status == NDM_OK ? mend_cut(store, old) : 0;
    }
    if ((refused || (status != NDM_OK && end > old)) && ndm_i_file_size(file) >= old) /* else somebody cut it short */
        ndm_i_store_shrink(store, old);
    return refused ? ndm_i_fail_io(refused, "cannot extend the file") : status;
}

void ndm_i_store_shrink(ndm_i_store *store, uint64_t capacity)
{
    const uint64_t first = ndm_i_grains_end(capacity), last = ndm_i_grains_end(store->file->capacity);
    ndm_i_writer_lock(&store->writer);
    ndm_i_file_shrink(store->file, capacity);
    if (store->file->capacity == capacity) {
        ndm_i_writer_forget(&store->writer, first, last);
        for (uint64_t grain = first; grain < last; grain++) {
            ndm_i_grain_set_state(&store->grains, grain, NDM_I_EMPTY);
            ndm_i_grain_unmark(&store->grains, grain, NDM_I_WIDE);
        }
        store->allocated = ndm_i_min(store->allocated, capacity); /* a grain that the new end cuts has lost the rest */
    }
    ndm_i_writer_unlock(&store->writer);
}

/* ---- writing -------------------------------------------------------------------------------------------- */

/* Make a grain ready for memcpy; a `vacant` one holds no value, and its pages may be zeroed. Returns 0 or errno. */
static int make_ready(ndm_i_store *store, uint64_t grain, bool vacant)
{
    const uint64_t start = grain * GRAIN, end = ndm_i_min(start + GRAIN, store->file->capacity);
    if (!store->file->keeps_blocks)
        return EOPNOTSUPP;
    if (ndm_i_grain_state(&store->grains, grain) == NDM_I_DROPPED && !vacant)
        return ESTALE;
    /* Blocks first: a write that failed for want of them would leave a folio behind that has none. */
    int refused = ndm_i_blocks_of_grain(store, grain);
    if (refused && !(refused == EOPNOTSUPP && vacant)) /* where blocks come by writing, zeroing gets them */
        return refused;
    refused = 0;
    if (vacant && store->file->in_memory && ndm_i_grain_state(&store->grains, grain) <= NDM_I_HOLE)
        ndm_i_mapping_populate(store->file->mapping->base + start, end - start);
    else if (vacant)
        refused = ndm_i_file_write(store->file, NULL, end - start, start);
    if (!refused)
        ndm_i_grain_set_state(&store->grains, grain, NDM_I_READY);
    return refused;
}

/* Make a begun grain ready by zeroing what no value holds from `offset` on. Returns 0 or errno. */
static int make_rest_ready(ndm_i_store *store, uint64_t grain, uint64_t offset, uint64_t vacant)
{
    const uint64_t start = grain * GRAIN, end = ndm_i_min(ndm_i_min(start + GRAIN, store->file->capacity), vacant);
    const uint64_t from = offset > start ? offset : start;
    int refused = ndm_i_file_write(store->file, NULL, end - from, from);
    if (!refused)
        ndm_i_grain_set_state(&store->grains, grain, NDM_I_READY);
    return refused;
}

/* Make all grains of [offset, end) ready. Gives the errno of the first that cannot be: EOPNOTSUPP or ESTALE if it can
 * be written by pwrite all the same. */
static int make_all_ready(ndm_i_store *store, uint64_t offset, uint64_t end, uint64_t vacant)
{
    ndm_i_blocks_ahead(store, end);
    for (uint64_t grain = offset / GRAIN; grain < ndm_i_grains_end(end); grain++) {
        const uint8_t state = ndm_i_grain_state(&store->grains, grain);
        const bool inside = grain * GRAIN >= offset && ndm_i_min((grain + 1) * GRAIN, store->file->capacity) <= vacant;
        if (state == NDM_I_READY)
            continue;
        int refused = state == NDM_I_BEGUN && !inside ? make_rest_ready(store, grain, offset, vacant)
                                                      : make_ready(store, grain, inside || state <= NDM_I_HOLE);
        if (refused)
            return refused;
    }
    return 0;
}

/* Zero [start, end) of one grain and make it safe to store to. Returns 0 or errno. */
static int clear_grain(ndm_i_store *store, uint64_t start, uint64_t end, uint64_t vacant_from, uint64_t vacant)
{
    const uint64_t grain = start / GRAIN;
    const uint8_t state = ndm_i_grain_state(&store->grains, grain);
    const bool inside = grain * GRAIN >= vacant_from && ndm_i_min((grain + 1) * GRAIN, store->file->capacity) <= vacant;
    if (state == NDM_I_READY) {
        const uint64_t before = ndm_i_watch_begin(store);
        memset(store->file->mapping->base + start, 0, end - start);
        ndm_i_watch_end(store, before);
        return 0;
    }
    if (state != NDM_I_DROPPED || inside) {
        const bool zeroed = inside || state <= NDM_I_HOLE;
        int refused = make_ready(store, grain, zeroed);
        if (refused || zeroed)
            return refused;
    }
    return ndm_i_file_write(store->file, NULL, end - start, start);
}

int ndm_i_store_clear(ndm_i_store *store, uint64_t offset, uint64_t size, uint64_t vacant)
{
    const uint64_t end = offset + size;
    int status = ndm_i_file_check_writable(store->file, end);
    if (status != NDM_OK)
        return status;
    ndm_i_blocks_ahead(store, end);
    for (uint64_t start = offset; start < end;) {
        const uint64_t stop = ndm_i_min((start / GRAIN + 1) * GRAIN, end);
        int refused = clear_grain(store, start, stop, offset, vacant);
        if (refused)
            return ndm_i_fail_io(refused, "cannot get room in the file");
        start = stop;
    }
    return NDM_OK;
}

/* Of a file that may be written to `offset` + `size`, into grains that are all `ready` or not. */
static int put(ndm_i_store *store, uint64_t offset, const void *data, uint64_t size, uint64_t vacant, bool ready)
{
    const uint64_t end = offset + size;
    bool made = false;
    if (!ready) {
        /* If a grain cannot be had, there may yet be room for these bytes. */
        ready = size < store->pwrite_from && make_all_ready(store, offset, end, vacant) == 0;
        if (!ready)
            return ndm_i_direct_put(store, offset, data, size);
        made = true;
    }
    ndm_i_strays_touched(store, offset, end);
    const uint64_t before = ndm_i_watch_begin(store);
    memcpy(store->file->mapping->base + offset, data, size);
    ndm_i_watch_end(store, before);
    if (made) /* others may come in, and take blocks of these grains: not before the store */
        ndm_i_writer_admit(&store->writer, offset / GRAIN, ndm_i_grains_end(end));
    return NDM_OK;
}

static int put_mapped(ndm_i_store *store, uint64_t offset, const void *data, uint64_t size, uint64_t vacant)
{
    const bool ready = ndm_i_grains_are_ready(&store->grains, offset, offset + size);
    const int status = ready ? NDM_OK : ndm_i_file_check_writable(store->file, offset + size);
    return status == NDM_OK ? put(store, offset, data, size, vacant, ready) : status;
}

int ndm_i_store_put(ndm_i_store *store, uint64_t offset, const void *data, uint64_t size, uint64_t vacant)
{
    if (size >= store->direct_from)
        return ndm_i_direct_put_large(store, offset, data, size);
    if (size < FETCH_FROM)
        return put_mapped(store, offset, data, size, vacant);
    const uint64_t before = ndm_i_store_moment(store);
    const int status = put_mapped(store, offset, data, size, vacant);
    if (status == NDM_OK)
        ndm_i_seen_note(store->seen, offset, before);
    return status;
}

/* Forget what a move has mapped of a large value. */
static void forget_moved(const ndm_i_store *store, uint64_t from, uint64_t to, uint64_t size)
{
    const ndm_i_mapping *mapping = store->file->mapping;
    ndm_i_mapping_forget(mapping, mapping->base + from, size, true);
    ndm_i_mapping_forget(mapping, mapping->base + to, size, true);
}

/* One piece of a move; no byte of it lies in both places. */
static int move_piece(ndm_i_store *store, uint64_t from, uint64_t to, uint64_t size, uint64_t vacant)
{
    const uint8_t *data = store->file->mapping->base + from;
    if (size >= NDM_I_LARGE)
        return ndm_i_direct_put(store, to, data, size);
    const bool ready = ndm_i_grains_are_ready(&store->grains, to, to + size);
    return put(store, to, data, size, ndm_i_max(vacant, to + size), ready);
}

int ndm_i_store_move(ndm_i_store *store, uint64_t from, uint64_t to, uint64_t size, uint64_t vacant,
                     _Atomic uint64_t *moved)
{
    const uint64_t distance = from > to ? from - to : to - from;
    /* What can be refused is refused before the value is written over itself: size, limits, and all blocks. */
    int status = NDM_OK;
    if (size >= NDM_I_LARGE || !ndm_i_grains_are_ready(&store->grains, to, to + size))
        status = ndm_i_file_check_writable(store->file, ndm_i_max(from, to) + size);
    if (status != NDM_OK)
        return status;
    for (uint64_t grain = to / GRAIN; grain < ndm_i_grains_end(to + size); grain++) {
        int refused = ndm_i_blocks_of_grain(store, grain);
        if (refused && refused != EOPNOTSUPP) /* without fallocate() no blocks were ever given back */
            return ndm_i_fail_io(refused, "cannot get room in the file");
    }
    if (size < FETCH_FROM)
        ndm_i_store_fetch_around(store, from, size);
    else
        ndm_i_store_fetch(store, from, store->file->mapping->base + from, size);
    uint64_t done = atomic_load_explicit(moved, memory_order_relaxed), forgotten = done;
    while (done < size && status == NDM_OK) {
        const uint64_t piece = ndm_i_min(ndm_i_min(size - done, distance), MOVE_STEP);
        status = move_piece(store, from + done, to + done, piece, vacant);
        if (status == NDM_OK)
            done += piece;
        atomic_store_explicit(moved, done, memory_order_release); /* the next piece may overwrite what this one read */
        if (size < NDM_I_LARGE)
            ndm_i_strays_touched(store, from, from + size);
        else if (store->forget_from != UINT64_MAX && (done - forgotten >= MOVE_STEP || done == size)) {
            forget_moved(store, from + forgotten, to + forgotten, done - forgotten);
            forgotten = done;
        }
    }
    return status;
}

/* ---- reading -------------------------------------------------------------------------------------------- */

/* Must the range be looked at before it is read? A large one always, others when they were dropped. */
static bool is_suspect(const ndm_i_store *store, uint64_t offset, uint64_t size)
{
    return size >= FETCH_FROM || ndm_i_grains_have(&store->grains, offset, offset + size, NDM_I_DROPPED);
}

/* Is all of the range in the queue? What is not has been dropped, or brought to RAM by a reader. */
static bool is_queued(const ndm_i_store *store, uint64_t offset, uint64_t size)
{
    bool queued = true;
    for (uint64_t grain = offset / GRAIN; queued && grain < ndm_i_grains_end(offset + size); grain++)
        queued = ndm_i_grain_is(&store->grains, grain, NDM_I_QUEUED);
    return queued;
}

bool ndm_i_store_at_hand(const ndm_i_store *store, uint64_t offset, uint64_t size)
{
    if (ndm_i_writer_is_limited(&store->writer) && !is_queued(store, offset, size))
        return false;
    return !is_suspect(store, offset, size) || ndm_i_seen_at(store->seen, offset, ndm_i_store_moment(store));
}

static __attribute__((noinline)) void fetch(ndm_i_store *store, uint64_t offset, const void *address, uint64_t size)
{
    if (is_suspect(store, offset, size)) {
        const uint64_t before = ndm_i_store_moment(store); /* what is dropped meanwhile is not seen */
        /* For pages that are there, madvise would look at each: 15 us for 1 MiB, against 0.3 for the count. */
        if (!ndm_i_is_cached(store->file, offset, offset + size)) {
            const bool let = ndm_i_gate_let(store->writer.gate);
            ndm_i_mapping_fetch(address, size);
            ndm_i_gate_come_back(store->writer.gate, let);
            store->misses++;
        }
        ndm_i_seen_note(store->seen, offset, before);
    }
    if (!ndm_i_writer_is_limited(&store->writer))
        return;
    for (uint64_t grain = offset / GRAIN; grain < ndm_i_grains_end(offset + size); grain++)
        ndm_i_grain_mark(&store->grains, grain, NDM_I_RECENT);
    ndm_i_writer_admit(&store->writer, offset / GRAIN, ndm_i_grains_end(offset + size));
}

static inline int load_at(const ndm_i_store *store, uint64_t offset, const void *address, void *buffer, uint64_t size)
{
    /* pread maps no page: nothing is added to RSS, and a later memcpy there meets no page that is mapped read-only. */
    if (size >= store->direct_from)
        return ndm_i_file_load(store->file, offset, buffer, size);
    memmove(buffer, address, size);
    return NDM_OK;
}

void ndm_i_store_fetch(ndm_i_store *store, uint64_t offset, const void *address, uint64_t size)
{
    if (!ndm_i_store_at_hand(store, offset, size))
        fetch(store, offset, address, size);
}

int ndm_i_store_load_viewed(const ndm_i_store *store, uint64_t offset, const void *address, void *buffer, uint64_t size)
{
    return load_at(store, offset, address, buffer, size);
}

int ndm_i_store_copy_out(ndm_i_store *store, uint64_t offset, void *buffer, uint64_t size)
{
    if (size < store->direct_from)
        ndm_i_strays_touched(store, offset, offset + size);
    return load_at(store, offset, store->file->mapping->base + offset, buffer, size);
}

int ndm_i_store_load(ndm_i_store *store, uint64_t offset, void *buffer, uint64_t size)
{
    if (size < store->direct_from)
        ndm_i_store_fetch(store, offset, store->file->mapping->base + offset, size);
    const int status = ndm_i_store_copy_out(store, offset, buffer, size);
    if (size >= store->direct_from && status == NDM_OK)
        ndm_i_writer_admit(&store->writer, offset / GRAIN, ndm_i_grains_end(offset + size));
    return status;
}

/* ---- giving back ---------------------------------------------------------------------------------------- */

bool ndm_i_store_punch(ndm_i_store *store, uint64_t offset, uint64_t size, bool stored_to)
{
    ndm_i_file *file = store->file;
    const uint64_t unit = stored_to ? GRAIN : (uint64_t)sysconf(_SC_PAGESIZE);
    const bool to_end = offset + size >= file->capacity;
    uint64_t start = (offset + unit - 1) / unit * unit;
    uint64_t end = to_end ? ndm_i_grains_end(file->capacity) * GRAIN : (offset + size) / unit * unit;
    if (stored_to && start < end && ndm_i_grains_are_wide(&store->grains, start / GRAIN))
        start = ndm_i_round_up(start, NDM_I_HUGE);
    if (stored_to && start < end && !to_end && ndm_i_grains_are_wide(&store->grains, (end - 1) / GRAIN))
        end = ndm_i_round_down(end, NDM_I_HUGE);
    const uint64_t first = start / GRAIN, last = ndm_i_grains_end(end);
    if (start >= end)
        return false;
    bool has_blocks = false;
    for (uint64_t grain = first; !has_blocks && grain < last; grain++)
        has_blocks = ndm_i_grain_state(&store->grains, grain) >= NDM_I_PARTIAL ||
                     (ndm_i_grain_state(&store->grains, grain) == NDM_I_EMPTY && grain * GRAIN < store->allocated);
    if (!has_blocks)
        return false;
    const bool done = ndm_i_file_punch(file, start, end);
    if (!done && !file->can_punch)
        return false;
    /* One that failed may have taken some blocks before it did. */
    ndm_i_writer_lock(&store->writer);
    for (uint64_t grain = first; grain < last; grain++) {
        const bool whole = done && grain * GRAIN >= start && (grain + 1) * GRAIN <= end;
        if (whole || ndm_i_grain_state(&store->grains, grain) <= NDM_I_HOLE) {
            ndm_i_grain_set_state(&store->grains, grain, NDM_I_HOLE);
            ndm_i_writer_forget(&store->writer, grain, grain + 1);
        } else {
            ndm_i_grain_set_state(&store->grains, grain, NDM_I_PARTIAL);
        }
    }
    ndm_i_grains_doubt(&store->grains, first, last);
    const uint64_t whole = ndm_i_round_down(end, NDM_I_HUGE) / GRAIN;
    for (uint64_t grain = ndm_i_round_up(start, NDM_I_HUGE) / GRAIN; done && grain < whole; grain++)
        ndm_i_grain_unmark(&store->grains, grain, NDM_I_WIDE);
    ndm_i_writer_unlock(&store->writer);
    return true;
}

int ndm_i_store_evict(ndm_i_store *store, uint64_t start, uint64_t end, bool neighbours)
{
    ndm_i_file *file = store->file;
    if (neighbours) { /* only whole folios can be dropped, and a folio may be as large as a grain */
        const uint64_t folio = file->large_folios ? GRAIN : (uint64_t)sysconf(_SC_PAGESIZE);
        start = start / folio * folio;
        end = ndm_i_min((end + folio - 1) / folio * folio, file->capacity);
        uint64_t first = start / GRAIN, last = ndm_i_grains_end(end);
        ndm_i_grains_widen(&store->grains, &first, &last, ndm_i_grains_end(file->capacity));
        start = ndm_i_min(start, first * GRAIN);
        end = ndm_i_max(end, ndm_i_min(last * GRAIN, file->capacity));
    }
    int refused = ndm_i_writer_settle(&store->writer, start, end, true);
    if (refused)
        return ndm_i_fail_io(refused, "cannot write the file back to disk");
    ndm_i_writer_lock(&store->writer);
    for (uint64_t grain = start / GRAIN; grain < ndm_i_grains_end(end); grain++) {
        if (ndm_i_grain_state(&store->grains, grain) >= NDM_I_READY)
            ndm_i_grain_set_state(&store->grains, grain, NDM_I_DROPPED);
        if (grain * GRAIN >= start && ndm_i_min((grain + 1) * GRAIN, file->capacity) <= end)
            ndm_i_writer_forget(&store->writer, grain, grain + 1);
    }
    ndm_i_writer_unlock(&store->writer);
    atomic_fetch_add(&store->writer.drops, 1);
    return NDM_OK;
}

int ndm_i_store_flush(ndm_i_store *store)
{
    const int refused = ndm_i_writer_settle(&store->writer, 0, store->file->capacity, false);
    return refused ? ndm_i_fail_io(refused, "cannot write the file back to disk") : NDM_OK;
}

uint64_t ndm_i_store_check(ndm_i_store *store)
{
    return ndm_i_grains_check(&store->grains, store->file->capacity) + ndm_i_writer_check(&store->writer) +
           (store->allocated > store->file->capacity);
}
