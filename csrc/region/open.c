/* A region's life, its figures, and its checker. Its verbs are in values.c, batch.c and space.c. */
#include "region/ledger.h"

#include "store/handles.h"
#include "os/status.h"

#include <assert.h>
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

/* The pages of a value this large leave the RSS with its last view; for less, the system call costs more. */
#define FORGET_FROM ((uint64_t)64 << 10)

/* ---- opening and closing -------------------------------------------------------------------------------- */

static void let_go(ndm_region *region)
{
    if (atomic_fetch_sub(&region->holders, 1) > 1)
        return;
    free(region->leases_path);
    free(region);
}

/* The region is closed and its last view has ended. */
static void last_use(ndm_i_home *home)
{
    ndm_region *region = (ndm_region *)((char *)home - offsetof(ndm_region, home));
    uint32_t extent;
    while (ndm_i_views_collect(home, &extent))
        ;
    ndm_i_backing_close(&region->data, NULL);
    let_go(region);
}

static int check_options(const ndm_options *options)
{
    if (options->initial_capacity == 0 || options->max_capacity == 0)
        return ndm_i_fail(NDM_ERR_ARGUMENT, "a capacity must be positive");
    if (options->max_capacity > INT64_MAX)
        return ndm_i_fail(NDM_ERR_ARGUMENT, "max_capacity must be below 2^63");
    if (options->initial_capacity > options->max_capacity)
        return ndm_i_fail(NDM_ERR_ARGUMENT, "initial_capacity must not exceed max_capacity");
    if (options->alignment == 0 || options->alignment > 4096 || (options->alignment & (options->alignment - 1)) != 0)
        return ndm_i_fail(NDM_ERR_ARGUMENT, "alignment must be a power of two, 1 to 4096");
    return NDM_OK;
}

/* Empty the data file. Where readers have it mapped it keeps its size, and becomes one hole but for what they lease: a
 * page that is cut off under a view would be SIGBUS. */
static int empty_data(ndm_region *region, uint64_t capacity, uint64_t ceiling, const ndm_i_span *leased,
                      uint64_t *leased_count)
{
    const bool alone = ndm_i_slots_bar_readers(&region->slots);
    int status = ndm_i_backing_start(&region->data, capacity, ceiling, !alone);
    if (alone)
        *leased_count = 0; /* nobody is there who could hold a lease */
    for (uint64_t i = 0, start = 0; i <= *leased_count && status == NDM_OK && !alone; i++) {
        const uint64_t end = i < *leased_count ? leased[i].offset : capacity;
        if (end > start && !ndm_i_backing_punch(&region->data, start, end))
            status = ndm_i_fail(NDM_ERR_BUSY, "readers have the old file open, and the file system punches no holes");
        start = i < *leased_count ? end + leased[i].size : end;
    }
    return status;
}

static int start_anew(ndm_region *region, const ndm_options *options)
{
    const uint64_t found = region->data.capacity;
    ndm_i_span *leased = malloc(NDM_I_LEASES * sizeof *leased);
    if (!leased)
        return ndm_i_fail(NDM_ERR_MEMORY, "no memory to look at the leases");
    /* In this order: readers learn that the values are gone, then they go. A file with data and without its mark would be
     * taken for somebody else's, so the table is emptied last. */
    uint64_t count = 0;
    int status = ndm_i_slots_invalidate(&region->slots);
    if (status == NDM_OK) {
        count = ndm_i_leased_before(region, leased);
        status = empty_data(region, found ? found : options->initial_capacity, ndm_i_ceiling(options->max_capacity),
                            leased, &count);
    }
    if (status == NDM_OK)
        status = ndm_i_slots_start(&region->slots, &region->data, options->alignment);
    if (status == NDM_OK)
        status = ndm_i_grains_init(&region->grains, &region->data, options->cache_limit);
    if (status == NDM_OK && count > 0)
        status = ndm_i_keep_places(region, leased, count);
    if (status == NDM_OK)
        region->leases.incarnation = ndm_i_word(&ndm_i_slots_header(&region->slots)->incarnation);
    ndm_i_slots_let_readers(&region->slots);
    free(leased);
    return status;
}

static int take_over(ndm_region *region, const ndm_options *options)
{
    int status = ndm_i_slots_adopt(&region->slots, &region->data);
    if (status == NDM_OK)
        status = ndm_i_backing_start(&region->data, region->data.capacity, ndm_i_ceiling(options->max_capacity), true);
    if (status == NDM_OK)
        status = ndm_i_grains_init(&region->grains, &region->data, options->cache_limit);
    if (status != NDM_OK)
        return status;
    region->unit_shift = (unsigned)__builtin_ctzll(ndm_i_slots_header(&region->slots)->alignment);
    return ndm_i_recover(region);
}

/* Open both files and, once nothing can be refused any more, empty or adopt them. */
static int open_files(ndm_region *region, const char *path, const char *slots_path, const char *directory,
                      const ndm_options *options)
{
    int status = path ? ndm_i_backing_open(&region->data, path, true, NDM_I_LOCK_FILE)
                      : ndm_i_backing_open_unnamed(&region->data, directory);
    if (status != NDM_OK)
        return status;
    if (region->data.capacity > options->max_capacity)
        status = ndm_i_fail_capacity(region->data.capacity, options->max_capacity);
    else
        status = ndm_i_slots_open(&region->slots, slots_path, &region->data);
    if (status != NDM_OK)
        goto fail;
    status = ndm_i_join_leases(region);
    if (status == NDM_OK && options->recover && region->slots.orphaned)
        status = (int)ndm_i_of_file(NDM_FILE_SLOTS, ndm_i_fail_io(EUCLEAN, "the file that the table speaks of is gone"));
    if (status == NDM_OK)
        status = options->recover && region->slots.ours ? take_over(region, options) : start_anew(region, options);
    if (status == NDM_OK)
        return NDM_OK;

    ndm_i_leased_forget(region);
    ndm_i_leases_close(&region->leases);
    ndm_i_grains_fini(&region->grains);
    ndm_i_extents_fini(&region->extents);
    ndm_i_slots_close(&region->slots, region->slots.table.created ? slots_path : NULL);
fail:
    ndm_i_backing_close(&region->data, region->data.created ? path : NULL);
    return status;
}

static ndm_region *region_new(const char *path, const char *directory, const ndm_options *options)
{
    ndm_region *region = NULL;
    char *slots_path = NULL, *leases_path = NULL;
    if (check_options(options) != NDM_OK)
        return NULL;
    region = calloc(1, sizeof *region);
    if (path) {
        slots_path = malloc(strlen(path) + sizeof ".slots");
        leases_path = malloc(strlen(path) + sizeof ".leases");
    }
    if (!region || (path && (!slots_path || !leases_path))) {
        ndm_i_fail(NDM_ERR_MEMORY, "no memory for a region");
        goto fail;
    }
    if (path) {
        strcat(strcpy(slots_path, path), ".slots");
        strcat(strcpy(leases_path, path), ".leases");
    }
    region->owner = ndm_i_owner_here();
    if (region->owner.process == 0) {
        ndm_i_fail(NDM_ERR_MEMORY, "no memory for the owner page");
        goto fail;
    }
    region->forget_from = options->cache_limit == NDM_I_UNLIMITED ? UINT64_MAX : FORGET_FROM;
    region->unit_shift = (unsigned)__builtin_ctzll(options->alignment);
    region->max_capacity = options->max_capacity;
    region->leases.file.fd = -1;
    region->leases_path = leases_path;
    ndm_i_extents_init(&region->extents);
    if (open_files(region, path, slots_path, directory, options) != NDM_OK)
        goto fail;
    region->initial_capacity = region->data.capacity;
    atomic_init(&region->holders, 2);
    ndm_i_home_init(&region->home, last_use);
    region->grains.storing = &region->home.writable;
    ndm_i_publish(region);
    free(slots_path);
    return region;

fail:
    free(slots_path);
    free(leases_path);
    free(region);
    return NULL;
}

ndm_region *ndm_region_open(const char *path, const ndm_options *options) { return region_new(path, NULL, options); }

ndm_region *ndm_region_open_temporary(const char *directory, const ndm_options *options)
{
    return region_new(NULL, directory, options);
}

static void shut(ndm_region *region)
{
    atomic_store(&region->owner.thread, 0);
    ndm_i_leased_forget(region);
    ndm_i_leases_close(&region->leases);
    ndm_i_slots_close(&region->slots, NULL);
    ndm_i_extents_fini(&region->extents);
    ndm_i_grains_fini(&region->grains);
    ndm_i_backing_unmap(&region->data);
    ndm_i_home_leave(&region->home);
}

static bool is_closed(const ndm_region *region)
{
    return !region || atomic_load_explicit(&region->owner.thread, memory_order_relaxed) == 0;
}

int ndm_region_is_closed(const ndm_region *region) { return is_closed(region); }

int ndm_region_in_memory(const ndm_region *region) { return region && region->data.in_memory; }

void ndm_region_destroy(ndm_region *region)
{
    if (!region || !ndm_i_is_process(region->owner.process))
        return;
    if (!ndm_i_handle_retire(region))
        return;
    if (!is_closed(region))
        shut(region);
    let_go(region);
}

/* ---- entering ------------------------------------------------------------------------------------------- */

int ndm_i_enter_to_look(ndm_region *region)
{
    if (is_closed(region))
        return ndm_i_fail(NDM_ERR_CLOSED, "the region is closed");
    if (!ndm_i_is_owner(&region->owner))
        return ndm_i_fail(NDM_ERR_WRONG_THREAD, "the region belongs to another thread or process");
    uint32_t extent;
    while (ndm_i_views_collect(&region->home, &extent))
        ndm_i_orphan_returns(region, extent);
    ndm_i_leased_collect(region, false);
    return NDM_OK;
}

int ndm_i_enter(ndm_region *region)
{
    int status = ndm_i_enter_to_look(region);
    if (status == NDM_OK && atomic_load_explicit(&region->grains.cache.error, memory_order_relaxed)) {
        const int failed = ndm_i_cache_settle(&region->grains, 0, region->data.capacity, false);
        status = ndm_i_fail_io(failed, "writing spilled values back to disk failed");
    }
    return status;
}

ndm_i_record *ndm_i_live_record(const ndm_region *region, int64_t slot)
{
    ndm_i_record *record = ndm_i_slots_record(&region->slots, slot);
    if (!record)
        ndm_i_fail(NDM_ERR_NO_SLOT, "the slot never existed");
    else if (!ndm_i_record_is_live(record))
        ndm_i_fail(NDM_ERR_FREED_SLOT, "the slot has been freed");
    else
        return record;
    return NULL;
}

int ndm_region_close(ndm_region *region)
{
    if (is_closed(region))
        return NDM_OK;
    int status = ndm_i_enter(region);
    /* a write-back that failed is told, and closes it all the same */
    if (status != NDM_ERR_WRONG_THREAD && ndm_i_handle_retire(region))
        shut(region);
    return status;
}

/* ---- figures -------------------------------------------------------------------------------------------- */

int ndm_region_slot(ndm_region *region, int64_t slot, ndm_slot *out)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    const ndm_i_record *record = ndm_i_slots_record(&region->slots, slot);
    if (!record)
        return ndm_i_fail(NDM_ERR_NO_SLOT, "the slot never existed");
    *out = (ndm_slot){.offset = ndm_i_record_offset(record),
                      .size = ndm_i_record_size(record),
                      .generation = ndm_i_record_generation(record),
                      .engine = ndm_i_record_engine(record),
                      .occupied = ndm_i_record_is_live(record)};
    return NDM_OK;
}

int ndm_region_contains(ndm_region *region, int64_t slot)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    const ndm_i_record *record = ndm_i_slots_record(&region->slots, slot);
    return record && ndm_i_record_is_live(record);
}

int ndm_region_stats(ndm_region *region, ndm_stats *out)
{
    int status = ndm_i_enter_to_look(region);
    if (status != NDM_OK)
        return status;
    uint64_t disk_bytes;
    if ((status = ndm_i_backing_disk_bytes(&region->data, &disk_bytes)) != NDM_OK)
        return status;
    /* A hole at the end reaches to the mark, a whole number of units; used_bytes is exact. */
    const ndm_i_extents *extents = &region->extents;
    const uint32_t last = ndm_i_extents_last(extents);
    uint64_t free_bytes = extents->free_units << region->unit_shift;
    if (last != NDM_I_NONE && ndm_i_extents_is_free(extents, last))
        free_bytes -= (extents->mark << region->unit_shift) - region->used_bytes;
    const uint64_t largest = ndm_i_extents_largest(extents) << region->unit_shift;
    *out = (ndm_stats){.capacity = region->data.capacity,
                       .max_capacity = region->max_capacity,
                       .used_bytes = region->used_bytes,
                       .live_bytes = region->live_bytes,
                       .free_bytes = free_bytes,
                       .pinned_bytes = region->pinned_bytes,
                       .largest_free_bytes = largest < free_bytes ? largest : free_bytes,
                       .slot_count = region->slots.count,
                       .live_slots = region->slots.live,
                       .growths = region->growths,
                       .moved_bytes = region->moved_bytes,
                       .disk_bytes = disk_bytes,
                       .alignment = (uint64_t)1 << region->unit_shift,
                       .can_punch = region->data.can_punch};
    if ((status = ndm_i_backing_residency(&region->data, &out->resident_bytes, &out->unwritten_bytes)) != NDM_OK)
        return status;
    ndm_i_cache_lock(&region->grains.cache);
    out->written_back_bytes = region->grains.cache.written_back;
    ndm_i_cache_unlock(&region->grains.cache);
    memcpy(out->engine_bytes, region->engine_bytes, sizeof out->engine_bytes);
    memcpy(out->engine_slots, region->engine_slots, sizeof out->engine_slots);
    return NDM_OK;
}

int ndm_region_allow_leases(ndm_region *region)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK || region->leases.table)
        return status;
    if ((status = ndm_i_leases_start(&region->leases, region->leases_path)) == NDM_OK)
        region->leases.incarnation = ndm_i_word(&ndm_i_slots_header(&region->slots)->incarnation);
    return status;
}

int ndm_region_share(ndm_region *region, int64_t slot, ndm_shared *out)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    const ndm_i_record *record = ndm_i_live_record(region, slot);
    if (!record)
        return ndm_last_error()->status;
    *out = (ndm_shared){.data = region->data.fd,
                        .slots = region->slots.table.fd,
                        .leases = region->leases.file.fd,
                        .generation = ndm_i_record_generation(record),
                        .incarnation = ndm_i_word(&ndm_i_slots_header(&region->slots)->incarnation)};
    return NDM_OK;
}

int ndm_region_info(ndm_region *region, ndm_info *out)
{
    int status = ndm_i_enter(region);
    if (status == NDM_OK)
        *out = (ndm_info){.capacity = region->data.capacity,
                          .max_capacity = region->max_capacity,
                          .used_bytes = region->used_bytes,
                          .live_bytes = region->live_bytes,
                          .slot_count = region->slots.count,
                          .live_slots = region->slots.live,
                          .alignment = (uint64_t)1 << region->unit_shift};
    return status;
}

int ndm_region_set_max_capacity(ndm_region *region, uint64_t max_capacity)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    if (max_capacity < region->max_capacity)
        return ndm_i_fail(NDM_ERR_ARGUMENT, "max_capacity can only be raised");
    if (max_capacity > INT64_MAX)
        return ndm_i_fail(NDM_ERR_ARGUMENT, "max_capacity must be below 2^63");
    region->max_capacity = max_capacity;
    ndm_i_publish(region);
    return NDM_OK;
}

/* ---- checking ------------------------------------------------------------------------------------------- */

/* Every used extent is a live slot's, or an orphan's; returns how many are neither, and sums both kinds up. */
static uint64_t check_extents(ndm_region *region, uint64_t *slots, uint64_t *orphan_bytes)
{
    const ndm_i_extents *extents = &region->extents;
    uint64_t broken = 0;
    for (uint32_t e = ndm_i_extents_first(extents); e != NDM_I_NONE; e = ndm_i_extents_next(extents, e)) {
        if (ndm_i_extents_is_free(extents, e))
            continue;
        const uint64_t length = ndm_i_extents_length(extents, e);
        const uint32_t tag = ndm_i_extents_tag(extents, e);
        if (tag == NDM_I_NONE) {
            *orphan_bytes += length << region->unit_shift;
            continue;
        }
        const ndm_i_record *record = ndm_i_slots_record(&region->slots, tag);
        *slots += 1;
        broken += !record || !ndm_i_record_is_live(record) || ndm_i_record_link(record) != e ||
                  ndm_i_record_offset(record) != ndm_i_extents_offset(extents, e) << region->unit_shift ||
                  ndm_i_units(region, ndm_i_record_size(record)) != length;
    }
    return broken;
}

int64_t ndm_region_check(ndm_region *region)
{
    int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    uint64_t broken = ndm_i_extents_check(&region->extents) + ndm_i_slots_check(&region->slots);
    uint64_t with_extent = 0, orphan_bytes = 0, empty = 0, live_bytes = 0, furthest = 0;
    uint64_t by_engine[256] = {0};
    if (broken == 0)
        broken += check_extents(region, &with_extent, &orphan_bytes);
    for (uint64_t i = 0; i < region->slots.count; i++) {
        const ndm_i_record *record = ndm_i_slots_record(&region->slots, (int64_t)i);
        if (!ndm_i_record_is_live(record))
            continue;
        const uint64_t end = ndm_i_record_offset(record) + ndm_i_record_size(record);
        empty += ndm_i_record_size(record) == 0;
        live_bytes += ndm_i_record_size(record);
        by_engine[ndm_i_record_engine(record)] += ndm_i_record_size(record);
        furthest = end > furthest ? end : furthest;
    }
    broken += with_extent + empty != region->slots.live;
    broken += live_bytes != region->live_bytes;
    broken += orphan_bytes != region->pinned_bytes;
    broken += memcmp(by_engine, region->engine_bytes, sizeof by_engine) != 0;
    broken += furthest > region->used_bytes;
    broken += region->used_bytes > region->extents.mark << region->unit_shift;
    broken += region->used_bytes > region->data.capacity || region->data.capacity > region->max_capacity;
    return (int64_t)broken;
}
