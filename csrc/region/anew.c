/* See anew.h. */
#include "region/anew.h"

#include "os/bytes.h"
#include "os/status.h"
#include "region/recover.h"

#include <stdlib.h>

struct plan {
    bool alone; /* no reader has the old file open */
    bool full;  /* readers have, and what they look at must not become a hole: see ndm_i_file.holes_need_room */
    ndm_i_span leased[NDM_I_LEASES];
    int64_t leased_count;
};

int ndm_i_start_store(ndm_region *region, const ndm_options *options)
{
    const int status = ndm_i_store_init(&region->store, &region->data, &region->home.writable, options->cache_limit,
                                        options->keep_mapped != 0);
    region->store.writer.gate = &region->gate;
    return status;
}

/* All that may be refused. The old values stay as they are. */
static int prepare(ndm_region *region, const ndm_options *options, struct plan *plan)
{
    const uint64_t capacity = region->data.capacity ? region->data.capacity : options->initial_capacity;
    /* A table that is new tells nothing of the readers of the one that was removed. */
    const bool tells = region->slots.found != NDM_I_NO_TABLE || ndm_i_file_has_data(&region->data) == 0;
    plan->alone = ndm_i_slots_bar_readers(&region->slots) && tells;
    plan->full = !plan->alone && region->data.holes_need_room;
    int status = ndm_i_file_check_writable(&region->data, capacity);
    if (status == NDM_OK && !plan->alone && !plan->full && !ndm_i_file_can_punch(&region->data))
        status = ndm_i_fail(NDM_ERR_BUSY, "readers may have the old file open, and the file system punches no holes");
    if (status == NDM_OK)
        status = ndm_i_file_start(&region->data, capacity, ndm_i_ceiling(options->max_capacity));
    if (status == NDM_OK)
        status = ndm_i_slots_prepare(&region->slots, &region->data);
    if (status == NDM_OK)
        status = ndm_i_start_store(region, options);
    if (status == NDM_OK && !plan->alone)
        status = ndm_i_reserve_places(region, NDM_I_LEASES);
    if (status == NDM_OK && !plan->alone && (plan->leased_count = ndm_i_leased_before(region, plan->leased)) < 0)
        status = (int)plan->leased_count; /* they can be read, then: begin() looks again */
    return status;
}

/* Empty the data file. Where readers have it mapped it keeps its size, and becomes one hole but for what they lease: a
 * page that is cut off under a view would be SIGBUS. Where a hole under a view may be that, too, the file keeps its bytes,
 * which are no value's. */
static int empty_data(ndm_region *region, const struct plan *plan)
{
    if (plan->alone)
        return ndm_i_file_empty(&region->data);
    if (plan->full) {
        ndm_i_grains_adopt(&region->store.grains, 0, region->data.capacity);
        return NDM_OK;
    }
    uint64_t start = 0;
    for (int64_t i = 0; i <= plan->leased_count; i++) {
        const ndm_i_span *leased = &plan->leased[i];
        const bool last = i == plan->leased_count;
        const uint64_t end = last ? region->data.capacity : leased->offset;
        if (end > start && !ndm_i_file_punch(&region->data, start, end))
            return ndm_i_fail(NDM_ERR_BUSY, "readers may have the old file open, and it cannot be punched");
        start = last ? end : end + leased->size;
    }
    return NDM_OK;
}

/* In this order: readers learn that the values are gone, then they go, and their records last. */
static int begin(ndm_region *region, const ndm_options *options, struct plan *plan)
{
    ndm_i_slots_invalidate(&region->slots);
    plan->leased_count = plan->alone ? 0 : ndm_i_leased_before(region, plan->leased);
    if (plan->leased_count < 0) { /* prepare() could read them. It is too late to refuse: anything may be leased */
        plan->leased[0] = (ndm_i_span){.size = region->data.capacity};
        plan->leased_count = 1;
    }
    int status = empty_data(region, plan);
    if (status == NDM_OK)
        status = ndm_i_slots_start(&region->slots, &region->data, options->alignment);
    if (status == NDM_OK && plan->leased_count > 0)
        status = ndm_i_keep_places(region, plan->leased, (uint64_t)plan->leased_count);
    if (status == NDM_OK)
        region->leases.incarnation = ndm_i_word(&ndm_i_slots_header(&region->slots)->incarnation);
    return status;
}

int ndm_i_start_anew(ndm_region *region, const ndm_options *options)
{
    const uint64_t found = region->data.capacity;
    struct plan *plan = malloc(sizeof *plan);
    if (!plan)
        return ndm_i_fail(NDM_ERR_MEMORY, "no memory to look at the leases");
    int status = prepare(region, options, plan);
    if (status == NDM_OK)
        status = begin(region, options, plan);
    if (status != NDM_OK && found == 0 && region->data.capacity > 0)
        ndm_i_file_shrink(&region->data, 0);
    ndm_i_slots_let_readers(&region->slots);
    free(plan);
    return status;
}
