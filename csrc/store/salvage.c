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
 * That is done grain by grain, so the copy is small, and again by each flush or eviction until one finds everything. What
 * it cannot help: pages that the kernel failed to write and dropped before we came, be it by its own write-back between
 * two calls, or by ours while the disk still counted as sound. That is why ordinary write-back stops at its first failure,
 * and why salvage begins there.
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
    unsigned char in_core[GRAIN / 4096];
    uint8_t *copy, *found; /* room for a grain each */
} piece;

/* The next run of pages that are in RAM: [*at, the end that it gives); *at is `end` when there is none. */
static uint64_t next_run(const piece *grain, uint64_t *at)
{
    while (*at < grain->end && !(grain->in_core[(*at - grain->start) / grain->page] & 1))
        *at += grain->page;
    uint64_t stop = *at;
    while (stop < grain->end && grain->in_core[(stop - grain->start) / grain->page] & 1)
        stop += grain->page;
    if (*at > grain->end)
        *at = grain->end;
    return stop < grain->end ? stop : grain->end;
}

static bool load(const piece *grain, uint8_t *into)
{
    for (uint64_t at = grain->start, stop; (stop = next_run(grain, &at)) > at; at = stop)
        if (ndm_i_file_load(grain->file, at, into + (at - grain->start), stop - at) != NDM_OK)
            return false;
    return true;
}

static bool is_found(const piece *grain)
{
    if (!load(grain, grain->found))
        return false;
    for (uint64_t at = grain->start, stop; (stop = next_run(grain, &at)) > at; at = stop)
        if (memcmp(grain->copy + (at - grain->start), grain->found + (at - grain->start), stop - at) != 0)
            return false;
    return true;
}

/* All of it, whatever is refused. 0 or errno. */
static int write_copy(const piece *grain)
{
    int refused = 0;
    for (uint64_t at = grain->start, stop; (stop = next_run(grain, &at)) > at; at = stop) {
        const int failed = ndm_i_file_write(grain->file, grain->copy + (at - grain->start), stop - at, at);
        refused = refused ? refused : failed;
    }
    return refused;
}

/* Somebody may be storing to it through the mapping: no copy would be good. It has all its blocks, so its pages can be
 * made dirty where they are. */
static int keep_dirty(const piece *grain)
{
    const int failed = ndm_i_file_write_back(grain->file, grain->start, grain->end, true);
    const ndm_i_mapping *mapping = grain->file->mapping;
    for (uint64_t at = grain->start, stop; failed && (stop = next_run(grain, &at)) > at; at = stop)
        ndm_i_mapping_populate(mapping->base + at, stop - at); /* for writing: that makes them dirty */
    if (failed)
        ndm_i_mapping_forget(mapping, mapping->base + grain->start, grain->end - grain->start); /* they stay dirty */
    return failed;
}

static int salvage_grain(piece *grain, bool stored_to, int *lost)
{
    if (!ndm_i_mapping_in_core(grain->file->mapping->base + grain->start, grain->end - grain->start, grain->in_core))
        return errno;
    uint64_t at = grain->start;
    if (next_run(grain, &at) == at)
        return 0;
    if (stored_to)
        return keep_dirty(grain);
    if (!load(grain, grain->copy))
        return EIO;
    int failed = ndm_i_file_write_back(grain->file, grain->start, grain->end, true);
    if (failed) /* it may have done no more than report what failed before; only clean pages can be dropped */
        ndm_i_file_write_back(grain->file, grain->start, grain->end, true);
    /* ext4 takes a page whose write failed for one that is on disk, though its blocks still count as never written: such
     * a page has to be dropped before it is written again. Where blocks are not kept, lack of room could lose it then. */
    if (grain->file->keeps_blocks) {
        ndm_i_file_drop(grain->file, grain->file->mapping, grain->start, grain->end);
        if (!failed && is_found(grain))
            return 0;
        failed = failed ? failed : EIO;
    }
    const int refused = failed ? write_copy(grain) : 0;
    *lost = *lost ? *lost : refused;
    return failed;
}

int ndm_i_salvage(const ndm_i_file *file, const ndm_i_grains *grains, const _Atomic uint64_t *storing, uint64_t from,
                  int *lost)
{
    const uint64_t count = ndm_i_grains_end(file->capacity);
    piece grain = {.file = file, .page = (uint64_t)sysconf(_SC_PAGESIZE), .copy = malloc(2 * GRAIN)};
    if (!grain.copy)
        return ENOMEM;
    grain.found = grain.copy + GRAIN;
    int refused = 0;
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t number = (from / GRAIN + i) % count;
        grain.start = number * GRAIN;
        grain.end = ndm_i_min(grain.start + GRAIN, file->capacity);
        /* A writable view lies in grains that have all their blocks. */
        const bool stored_to = atomic_load(storing) > 0 && ndm_i_grain_state(grains, number) >= NDM_I_READY;
        const int failed = salvage_grain(&grain, stored_to, lost);
        refused = refused ? refused : failed;
    }
    free(grain.copy);
    return refused ? refused : ndm_i_file_sync(file);
}
