/* See direct.h. */
#include "store/direct.h"

#include "os/bits.h"
#include "os/bytes.h"
#include "os/gather.h"
#include "os/status.h"
#include "store/blocks.h"

#define GRAIN NDM_I_GRAIN

/* The file is to be written to by pwrite. Have its grains all their blocks then? */
static bool prepare(ndm_i_store *store, uint64_t offset, uint64_t end)
{
    ndm_i_blocks_ahead(store, end);
    bool all = store->file->keeps_blocks;
    for (uint64_t grain = offset / GRAIN; all && grain < ndm_i_grains_end(end); grain++)
        all = ndm_i_blocks_of_grain(store, grain) == 0;
    return all;
}

/* Whole, aligned 1 and 2 MiB of [offset, end), whose grains have all their blocks, may get folios of their size. */
static bool make_wide(ndm_i_store *store, uint64_t offset, uint64_t end)
{
    if (!store->file->large_folios)
        return false;
    const uint64_t first = ndm_i_round_up(offset, NDM_I_DOUBLE) / GRAIN;
    const uint64_t last = ndm_i_round_down(end, NDM_I_DOUBLE) / GRAIN;
    for (uint64_t grain = first; grain < last; grain++)
        ndm_i_grain_mark(&store->grains, grain, NDM_I_WIDE);
    return first < last;
}

/* Note what a pwrite has made of the grains. */
static void note(ndm_i_store *store, uint64_t offset, uint64_t end, bool all)
{
    const uint64_t capacity = store->file->capacity;
    ndm_i_writer_lock(&store->writer); /* the thread may be dropping one of them */
    for (uint64_t grain = offset / GRAIN; grain < ndm_i_grains_end(end); grain++) {
        const bool to_end = ndm_i_min((grain + 1) * GRAIN, capacity) <= end;
        const uint8_t state = ndm_i_grain_state(&store->grains, grain);
        const bool keeps = store->file->keeps_blocks;
        /* Values come in order more often than not: one that ends a begun grain has filled it. */
        const bool filled = to_end && (grain * GRAIN >= offset || state == NDM_I_BEGUN);
        if (keeps && filled && (all || !ndm_i_grains_are_wide(&store->grains, grain)))
            ndm_i_grain_set_state(&store->grains, grain, NDM_I_READY);
        else if (keeps && all && state < NDM_I_READY)
            ndm_i_grain_set_state(&store->grains, grain, NDM_I_BEGUN);
        else if (state <= NDM_I_HOLE)
            ndm_i_grain_set_state(&store->grains, grain, NDM_I_PARTIAL);
    }
    ndm_i_writer_unlock(&store->writer);
    ndm_i_writer_admit(&store->writer, offset / GRAIN, ndm_i_grains_end(end));
}

/* Let others in, if that is allowed, while the bytes are written: none may take these grains for ones without values. Where
 * they have `all` their blocks, their states say so, too: others who take some of these change them. */
static bool let_others(ndm_i_store *store, uint64_t offset, uint64_t end, bool all)
{
    if (!store->writer.gate || !store->writer.gate->lets)
        return false;
    ndm_i_writer_lock(&store->writer);
    for (uint64_t grain = offset / GRAIN; grain < ndm_i_grains_end(end); grain++)
        if (ndm_i_grain_state(&store->grains, grain) < (all ? NDM_I_READY : NDM_I_PARTIAL))
            ndm_i_grain_set_state(&store->grains, grain, all ? NDM_I_BEGUN : NDM_I_PARTIAL);
    ndm_i_writer_unlock(&store->writer);
    return ndm_i_writer_let(&store->writer);
}

static int put(ndm_i_store *store, uint64_t offset, struct iovec *parts, uint64_t count, uint64_t size)
{
    const uint64_t end = offset + size;
    const bool all = prepare(store, offset, end), wide = all && make_wide(store, offset, end);
    const bool let = let_others(store, offset, end, all);
    const int refused = ndm_i_file_gather(store->file, parts, count, offset, wide);
    ndm_i_writer_come_back(&store->writer, let);
    if (refused)
        return ndm_i_fail_io(refused, "cannot write to the file");
    note(store, offset, end, all && !(let && ndm_i_grains_have(&store->grains, offset, end, NDM_I_PARTIAL)));
    return NDM_OK;
}

int ndm_i_direct_put(ndm_i_store *store, uint64_t offset, const void *data, uint64_t size)
{
    struct iovec part = {(void *)data, size};
    return put(store, offset, &part, 1, size);
}

/* Small values that were here before may have left their pages mapped. The first large one in 2 MiB forgets them all; from
 * then on small ones there are strays. */
static void forget_former(ndm_i_store *store, uint64_t offset, uint64_t size)
{
    const uint64_t first = ndm_i_round_down(offset, NDM_I_HUGE), last = ndm_i_round_up(offset + size, NDM_I_HUGE);
    bool touched = false;
    for (uint64_t grain = first / GRAIN; !touched && grain < ndm_i_min(last / GRAIN, store->grains.room); grain++)
        touched = store->grains.large[grain * GRAIN / NDM_I_HUGE] == 0 &&
                  ndm_i_grain_state(&store->grains, grain) >= NDM_I_PARTIAL;
    if (touched && store->forget_from != UINT64_MAX)
        ndm_i_mapping_forget(store->file->mapping, store->file->mapping->base + offset, size, true);
}

int ndm_i_direct_put_large(ndm_i_store *store, uint64_t offset, const void *data, uint64_t size)
{
    struct iovec part = {(void *)data, size};
    return ndm_i_direct_gather(store, offset, &part, 1, size);
}

int ndm_i_direct_gather(ndm_i_store *store, uint64_t offset, struct iovec *parts, uint64_t count, uint64_t size)
{
    const uint64_t before = ndm_i_store_moment(store);
    int status = ndm_i_file_check_writable(store->file, offset + size);
    if (status != NDM_OK)
        return status;
    forget_former(store, offset, size);
    status = put(store, offset, parts, count, size);
    if (status == NDM_OK)
        ndm_i_seen_note(store->seen, offset, before);
    return status;
}
