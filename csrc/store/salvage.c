/* What follows a failed write-back.
 *
 * The kernel takes a page that it could not write for a clean one. It may drop such a page whenever it wants memory, and
 * says only once, to whoever waits, that something failed: not where, nor whether it was a page or the file system's note
 * of where a page is. So the error says that the pages in RAM may be on disk or not, and nothing else can be trusted:
 *
 *   - Before a page can become clean again it is copied. The kernel may fail and drop it at any moment after that.
 *   - It is taken for written only if it was dropped, read back from the disk, and found equal to the copy.
 *   - If not, it is written from the copy, which makes it dirty; and dirty pages stay.
 *
 * That is done grain by grain, or folio by folio where these are larger, so the copy is small, and again by each flush or
 * eviction until one finds everything. What it cannot help: pages that the kernel failed to write and dropped before we
 * came, be it by its own write-back between two calls, or by ours while the disk still counted as sound. That is why
 * ordinary write-back stops at its first failure, and why salvage begins there.
 */
#define _GNU_SOURCE
#include "store/salvage.h"

#include "os/bits.h"
#include "os/bytes.h"
#include "os/status.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define GRAIN NDM_I_GRAIN

typedef struct {
    const ndm_i_file *file;
    uint64_t start, end, page;
    unsigned char in_core[NDM_I_HUGE / 4096];
    uint8_t *copy, *found; /* room for the largest folio each */
} piece;

/* The next run of pages that are in RAM: [*at, the end that it gives); *at is `end` when there is none. */
static uint64_t next_run(const piece *unit, uint64_t *at)
{
    while (*at < unit->end && !(unit->in_core[(*at - unit->start) / unit->page] & 1))
        *at += unit->page;
    uint64_t stop = *at;
    while (stop < unit->end && unit->in_core[(stop - unit->start) / unit->page] & 1)
        stop += unit->page;
    if (*at > unit->end)
        *at = unit->end;
    return stop < unit->end ? stop : unit->end;
}

static bool load(const piece *unit, uint8_t *into)
{
    for (uint64_t at = unit->start, stop; (stop = next_run(unit, &at)) > at; at = stop)
        if (ndm_i_file_load(unit->file, at, into + (at - unit->start), stop - at) != NDM_OK)
            return false;
    return true;
}

static bool is_found(const piece *unit)
{
    if (!load(unit, unit->found))
        return false;
    for (uint64_t at = unit->start, stop; (stop = next_run(unit, &at)) > at; at = stop)
        if (memcmp(unit->copy + (at - unit->start), unit->found + (at - unit->start), stop - at) != 0)
            return false;
    return true;
}

/* All of it, whatever is refused. 0 or errno. */
static int write_copy(const piece *unit)
{
    int refused = 0;
    for (uint64_t at = unit->start, stop; (stop = next_run(unit, &at)) > at; at = stop) {
        const int failed = ndm_i_file_write(unit->file, unit->copy + (at - unit->start), stop - at, at);
        refused = refused ? refused : failed;
    }
    return refused;
}

/* Somebody may be storing to it through the mapping: no copy would be good. It has all its blocks, so its pages can be
 * made dirty where they are. */
static int keep_dirty(const piece *unit)
{
    const int failed = ndm_i_file_write_back(unit->file, unit->start, unit->end, true);
    const ndm_i_mapping *mapping = unit->file->mapping;
    for (uint64_t at = unit->start, stop; failed && (stop = next_run(unit, &at)) > at; at = stop)
        ndm_i_mapping_populate(mapping->base + at, stop - at); /* for writing: that makes them dirty */
    if (failed)
        ndm_i_mapping_forget(mapping, mapping->base + unit->start, unit->end - unit->start, false); /* they stay dirty */
    return failed;
}

static int salvage_unit(piece *unit, bool stored_to, int *lost)
{
    if (!ndm_i_mapping_in_core(unit->file->mapping->base + unit->start, unit->end - unit->start, unit->in_core))
        return errno;
    uint64_t at = unit->start;
    if (next_run(unit, &at) == at)
        return 0;
    if (stored_to)
        return keep_dirty(unit);
    if (!load(unit, unit->copy))
        return EIO;
    int failed = ndm_i_file_write_back(unit->file, unit->start, unit->end, true);
    if (failed) /* it may have done no more than report what failed before; only clean pages can be dropped */
        ndm_i_file_write_back(unit->file, unit->start, unit->end, true);
    /* ext4 takes a page whose write failed for one that is on disk, though its blocks still count as never written: such
     * a page has to be dropped before it is written again. Where blocks are not kept, lack of room could lose it then. */
    if (unit->file->keeps_blocks) {
        ndm_i_file_drop(unit->file, unit->file->mapping, unit->start, unit->end);
        if (!failed && is_found(unit))
            return 0;
        failed = failed ? failed : EIO;
    }
    const int refused = failed ? write_copy(unit) : 0;
    *lost = *lost ? *lost : refused;
    return failed;
}

/* A writable view lies in grains that have all their blocks. */
static bool is_ready(const ndm_i_grains *grains, uint64_t first, uint64_t last)
{
    bool ready = false;
    for (uint64_t grain = first; !ready && grain < last; grain++)
        ready = ndm_i_grain_state(grains, grain) >= NDM_I_READY;
    return ready;
}

int ndm_i_salvage(const ndm_i_file *file, const ndm_i_grains *grains, const _Atomic uint64_t *storing, uint64_t from,
                  int *lost)
{
    const uint64_t count = ndm_i_grains_end(file->capacity);
    piece unit = {.file = file, .page = (uint64_t)sysconf(_SC_PAGESIZE), .copy = malloc(2 * NDM_I_HUGE)};
    if (!unit.copy)
        return ENOMEM;
    unit.found = unit.copy + NDM_I_HUGE;
    int refused = 0;
    for (uint64_t done = 0, first, last; done < count; done += last - first) {
        first = (from / GRAIN + done) % count;
        last = first + 1;
        ndm_i_grains_widen(grains, &first, &last, count); /* only whole folios can be dropped */
        unit.start = first * GRAIN;
        unit.end = ndm_i_min(last * GRAIN, file->capacity);
        const bool stored_to = atomic_load(storing) > 0 && is_ready(grains, first, last);
        const int failed = salvage_unit(&unit, stored_to, lost);
        refused = refused ? refused : failed;
    }
    free(unit.copy);
    return refused ? refused : ndm_i_file_sync(file);
}
