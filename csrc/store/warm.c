/* See warm.h. */
#include "store/warm.h"

#include "os/bits.h"
#include "os/bytes.h"
#include "os/residency.h"
#include "store/blocks.h"
#include "store/strays.h"

#define GRAIN NDM_I_GRAIN

static void fetch_grain(ndm_i_store *store, uint64_t grain)
{
    const uint64_t start = grain * GRAIN, end = ndm_i_min(start + GRAIN, store->file->capacity);
    if (!ndm_i_is_cached(store->file, start, end)) {
        ndm_i_mapping_fetch(store->file->mapping->base + start, end - start);
        store->fetched += end - start;
    }
}

/* Read a cold grain, which becomes READY. false: it cannot be. */
static bool bring_back(ndm_i_store *store, uint64_t grain)
{
    ndm_i_file *file = store->file;
    const uint64_t end = ndm_i_min((grain + 1) * GRAIN, file->capacity);
    if (!file->keeps_blocks || ndm_i_file_size(file) < end)
        return false;
    if (ndm_i_blocks_of_grain(store, grain) != 0)
        return false;
    fetch_grain(store, grain);
    ndm_i_writer_lock(&store->writer); /* the thread may be dropping it: then its pages come back one by one */
    ndm_i_grain_set_state(&store->grains, grain, NDM_I_READY);
    ndm_i_writer_unlock(&store->writer);
    ndm_i_writer_admit(&store->writer, grain, grain + 1);
    return true;
}

bool ndm_i_store_warm(ndm_i_store *store, uint64_t offset, bool worth)
{
    const uint64_t grain = offset / GRAIN, start = grain * GRAIN, end = ndm_i_min(start + GRAIN, store->file->capacity);
    if (ndm_i_store_is_cold(store, offset)) {
        if (!worth || !bring_back(store, grain))
            return false;
    } else if (!ndm_i_is_stale(store, offset)) {
        return true;
    } else if (worth) {
        fetch_grain(store, grain);
    }
    store->grains.rounds[grain] = store->round;
    if (ndm_i_grain_state(&store->grains, grain) == NDM_I_READY && (worth || ndm_i_is_cached(store->file, start, end))) {
        ndm_i_strays_touched(store, start, end);
        ndm_i_mapping_renew(store->file->mapping, start, end);
    }
    return true;
}

void ndm_i_store_fetch_around(ndm_i_store *store, uint64_t offset, uint64_t size)
{
    for (uint64_t grain = offset / GRAIN; grain < ndm_i_grains_end(offset + size); grain++) {
        if (!ndm_i_store_is_cold(store, grain * GRAIN) || store->asked == grain + 1)
            continue;
        fetch_grain(store, grain);
        store->asked = grain + 1;
        ndm_i_writer_admit(&store->writer, grain, grain + 1);
    }
}
