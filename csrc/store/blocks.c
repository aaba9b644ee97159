/* See blocks.h. */
#include "store/blocks.h"

#include "os/bits.h"
#include "os/bytes.h"

#include <errno.h>

#define GRAIN NDM_I_GRAIN

/* Cold values of 64 B to 1 MiB by memcpy: into a sparse mapping 350-540, into fallocated space 275-450, into fallocated
 * space zeroed by pwrite, a grain at a time, 120-200. In a mapping with MADV_RANDOM, such as ours, a store into a hole
 * gets one page instead of a large folio: 1200-1700, and with MADV_POPULATE_WRITE no less than 1040; so no store may
 * meet a page that is not there. Asking for blocks in large pieces keeps the file's extents few. Zeroing 64 KiB at a
 * time is 50 % slower than a grain, 2 MiB 5 % faster. */
#define ALLOCATE_STEP ((uint64_t)16 << 20)

void ndm_i_blocks_ahead(ndm_i_store *store, uint64_t end)
{
    /* No more than a quarter of what the disk has left: the slot table and others need some, too. A refusal is no failure,
     * since later calls find out what is really there. Blocks that are not kept are not worth a call. */
    if (store->file->in_memory || !store->file->keeps_blocks || end <= store->allocated)
        return;
    uint64_t upto = ndm_i_min(ndm_i_round_up(end, ALLOCATE_STEP), store->file->capacity);
    const uint64_t left = ndm_i_file_disk_free(store->file) / 4;
    if (upto - store->allocated > left)
        upto = ndm_i_min(ndm_i_max(ndm_i_round_up(end, GRAIN), ndm_i_round_down(store->allocated + left, GRAIN)), upto);
    if (ndm_i_file_allocate(store->file, store->allocated, upto) == 0 && store->file->can_allocate)
        store->allocated = upto;
}

int ndm_i_blocks_of_grain(ndm_i_store *store, uint64_t grain)
{
    uint64_t start = grain * GRAIN, end = ndm_i_min(start + GRAIN, store->file->capacity);
    const uint8_t state = ndm_i_grain_state(&store->grains, grain);
    if (state >= NDM_I_READY || (state == NDM_I_EMPTY && end <= store->allocated))
        return 0;
    if (ndm_i_grains_are_wide(&store->grains, grain)) { /* with all that may share its folio */
        start = ndm_i_round_down(start, NDM_I_HUGE);
        end = ndm_i_min(start + NDM_I_HUGE, store->file->capacity);
    }
    int refused = ndm_i_file_allocate(store->file, start, end);
    if (!refused && !store->file->can_allocate)
        return EOPNOTSUPP;
    return refused;
}
