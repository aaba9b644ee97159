/* See gather.h. */
#include "store/gather.h"

#include "os/residency.h"
#include "os/status.h"

#define GRAIN NDM_I_GRAIN

/* ---- what is known -------------------------------------------------------------------------------------- */

/* Is the range in RAM as far as the books go? Under a limit our own drops come long before the kernel's, and the states
 * of the grains show them. Without one the books know nothing. */
static bool is_known(const ndm_i_store *store, uint64_t offset, uint64_t size)
{
    if (store->file->in_memory)
        return true;
    bool known = ndm_i_writer_is_limited(&store->writer);
    for (uint64_t grain = offset / GRAIN; known && grain < ndm_i_grains_end(offset + size); grain++) {
        const uint8_t state = ndm_i_grain_state(&store->grains, grain);
        known = (state == NDM_I_READY || state == NDM_I_BEGUN) && ndm_i_grain_is(&store->grains, grain, NDM_I_QUEUED);
    }
    return known;
}

bool ndm_i_store_misses(ndm_i_store *store, uint64_t offset, uint64_t size)
{
    if (is_known(store, offset, size))
        return false;
    const uint64_t moment = ndm_i_store_moment(store);
    if (ndm_i_seen_at(store->seen, offset, moment))
        return false;
    if (ndm_i_is_missing(store->file, offset, offset + size))
        return true;
    ndm_i_seen_note(store->seen, offset, moment);
    return false;
}

/* ---- windows -------------------------------------------------------------------------------------------- */

/* Grains of a window: three of them, two in use and one to come, leave the writer a quarter of the limit for its work. */
static uint64_t window_grains(const ndm_i_store *store)
{
    const uint64_t share = store->writer.limit / 8;
    return ndm_i_max(ndm_i_min(share, NDM_I_AHEAD_GRAINS), 1);
}

/* The pages of the places come to RAM now. What is there already gets a second round, lest it be dropped before it is
 * read. */
static void admit(ndm_i_store *store, const ndm_i_wanted *wanted, uint64_t count)
{
    if (!ndm_i_writer_is_limited(&store->writer))
        return;
    uint64_t next = 0; /* the first grain that is not admitted */
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t first = ndm_i_max(wanted[i].offset / GRAIN, next);
        const uint64_t end = ndm_i_grains_end(wanted[i].offset + wanted[i].size);
        for (uint64_t grain = first; grain < end; grain++)
            if (ndm_i_grain_is(&store->grains, grain, NDM_I_QUEUED))
                ndm_i_grain_mark(&store->grains, grain, NDM_I_RECENT);
        if (end > first)
            ndm_i_writer_admit(&store->writer, first, end);
        next = ndm_i_max(next, end);
    }
}

/* What is known to be in RAM is left out. */
static void ask(ndm_i_store *store, const uint8_t *base, const ndm_i_wanted *wanted, uint64_t count)
{
    const uint64_t before = ndm_i_store_moment(store); /* what is dropped meanwhile is not seen */
    for (uint64_t i = 0, from = 0; i <= count; i++) {
        if (i < count && !is_known(store, wanted[i].offset, wanted[i].size)) {
            ndm_i_seen_note(store->seen, wanted[i].offset, before);
            continue;
        }
        const bool let = ndm_i_gate_let(store->writer.gate);
        ndm_i_ahead_ask(base, wanted + from, i - from);
        ndm_i_gate_come_back(store->writer.gate, let);
        from = i + 1;
    }
}

void ndm_i_store_gather(ndm_i_store *store, const uint8_t *base, ndm_i_wanted *wanted, uint64_t count)
{
    uint64_t left, held; /* grains from here on, and of the window */
    ndm_i_ahead_sort(wanted, count);
    ndm_i_ahead_window(wanted, count, 0, UINT64_MAX, &left);
    for (uint64_t from = 0, to; from < count; from = to, left -= ndm_i_min(left, held)) {
        to = ndm_i_ahead_window(wanted, count, from, window_grains(store), &held);
        admit(store, wanted + from, to - from);
        if (left <= store->writer.limit / 2 || to == count)
            ask(store, base, wanted + from, to - from);
    }
}

static int copy(ndm_i_store *store, const uint8_t *base, const ndm_i_wanted *wanted, uint64_t count, uint8_t *buffer)
{
    int status = NDM_OK;
    const bool let = ndm_i_gate_let(store->writer.gate);
    for (const ndm_i_wanted *from = wanted; from < wanted + count && status == NDM_OK; from++) {
        uint8_t *to = buffer + from->tag;
        status = let ? ndm_i_store_load_viewed(store, from->offset, base + from->offset, to, from->size)
                     : ndm_i_store_copy_out(store, from->offset, to, from->size);
    }
    ndm_i_gate_come_back(store->writer.gate, let);
    return status;
}

int ndm_i_store_load_many(ndm_i_store *store, const uint8_t *base, ndm_i_wanted *wanted, uint64_t count,
                          uint8_t *buffer)
{
    uint64_t copied = 0, asked = 0, held;
    int status = NDM_OK;
    ndm_i_ahead_sort(wanted, count);
    while (copied < count && status == NDM_OK) {
        const uint64_t most = window_grains(store);
        const uint64_t next = ndm_i_ahead_window(wanted, count, asked, most, &held);
        admit(store, wanted + asked, next - asked);
        if (held <= most) /* a value that fills more than a window is read in one go by itself */
            ask(store, base, wanted + asked, next - asked);
        status = copy(store, base, wanted + copied, asked - copied, buffer);
        copied = asked;
        asked = next;
    }
    return status;
}
