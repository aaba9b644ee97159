/* A region's life: opening, closing, handing over, and its ceiling. */
#define _GNU_SOURCE
#include "region/ledger.h"

#include "os/status.h"
#include "region/recover.h"
#include "store/handles.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* The pages of a value this large leave the RSS with its last view; for less, the system call costs more. */
#define FORGET_FROM ((uint64_t)64 << 10)

/* ---- opening and closing -------------------------------------------------------------------------------- */

static void let_go(ndm_region *region)
{
    if (atomic_fetch_sub(&region->holders, 1) > 1)
        return;
    ndm_i_owner_fini(&region->owner);
    free(region->leases_path);
    free(region);
}

/* The region is closed and its last view has ended. */
static void last_use(ndm_i_home *home)
{
    ndm_region *region = (ndm_region *)((char *)home - offsetof(ndm_region, home));
    uint32_t extent;
    while (ndm_i_pins_collect(home, &extent))
        ;
    ndm_i_fork_remove(&region->at_fork);
    ndm_i_file_close(&region->data, NULL);
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
 * page that is cut off under a view would be SIGBUS. Where a view of a hole may be that, too, it keeps its bytes: *full. */
static int empty_data(ndm_region *region, uint64_t capacity, uint64_t ceiling, const ndm_i_span *leased,
                      uint64_t *leased_count, bool *full)
{
    const bool alone = ndm_i_slots_bar_readers(&region->slots);
    int status = ndm_i_file_start(&region->data, capacity, ceiling, !alone);
    if (alone)
        *leased_count = 0; /* nobody is there who could hold a lease */
    *full = !alone && region->data.holes_need_room;
    for (uint64_t i = 0, start = 0; i <= *leased_count && status == NDM_OK && !alone && !*full; i++) {
        const uint64_t end = i < *leased_count ? leased[i].offset : capacity;
        if (end > start && !ndm_i_file_punch(&region->data, start, end))
            status = ndm_i_fail(NDM_ERR_BUSY, "readers have the old file open, and the file system punches no holes");
        start = i < *leased_count ? end + leased[i].size : end;
    }
    return status;
}

static int start_store(ndm_region *region, const ndm_options *options)
{
    return ndm_i_store_init(&region->store, &region->data, &region->home.writable, options->cache_limit);
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
    bool full = false;
    int status = ndm_i_slots_invalidate(&region->slots);
    if (status == NDM_OK) {
        const int64_t kept = ndm_i_leased_before(region, leased);
        status = kept < 0 ? (int)kept : NDM_OK;
        count = kept < 0 ? 0 : (uint64_t)kept;
    }
    if (status == NDM_OK) {
        status = empty_data(region, found ? found : options->initial_capacity, ndm_i_ceiling(options->max_capacity),
                            leased, &count, &full);
    }
    if (status == NDM_OK)
        status = ndm_i_slots_start(&region->slots, &region->data, options->alignment);
    if (status == NDM_OK)
        status = start_store(region, options);
    if (status == NDM_OK && full) /* what is in the file is no value's, but is there */
        ndm_i_grains_adopt(&region->store.grains, 0, region->data.capacity);
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
        status = ndm_i_file_start(&region->data, region->data.capacity, ndm_i_ceiling(options->max_capacity), true);
    if (status == NDM_OK)
        status = start_store(region, options);
    if (status != NDM_OK)
        return status;
    region->unit_shift = (unsigned)__builtin_ctzll(ndm_i_slots_header(&region->slots)->alignment);
    return ndm_i_recover(region);
}

/* Open both files and, once nothing can be refused any more, empty or adopt them. */
static int open_files(ndm_region *region, const char *path, const char *slots_path, const char *directory,
                      const ndm_options *options)
{
    int status = path ? ndm_i_file_open(&region->data, path, true, NDM_I_LOCK_FILE)
                      : ndm_i_file_open_unnamed(&region->data, directory);
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
        status = (int)ndm_i_of_file(NDM_FILE_SLOTS, ndm_i_fail_io(EUCLEAN, "the data file that the slot table describes is gone"));
    if (status == NDM_OK)
        status = options->recover && region->slots.ours ? take_over(region, options) : start_anew(region, options);
    if (status == NDM_OK)
        return NDM_OK;

    ndm_i_limbo_forget(&region->limbo);
    ndm_i_leases_close(&region->leases);
    ndm_i_store_fini(&region->store);
    ndm_i_extents_fini(&region->extents);
    ndm_i_slots_close(&region->slots, region->slots.table.created ? slots_path : NULL);
fail:
    ndm_i_file_close(&region->data, region->data.created ? path : NULL);
    return status;
}

/* Everything but the data file, which goes with the last view. */
static void shut(ndm_region *region)
{
    ndm_i_limbo_forget(&region->limbo);
    ndm_i_leases_close(&region->leases);
    ndm_i_slots_close(&region->slots, NULL);
    ndm_i_extents_fini(&region->extents);
    ndm_i_store_fini(&region->store);
    ndm_i_file_unmap(&region->data);
    ndm_i_home_leave(&region->home);
}

/* In a forked child, on its only thread: let go of the copies of what the parent has open. Views that the child inherited
 * keep their mapping. If another thread of the parent's may have been inside a verb, its books may be half-written, and
 * only the descriptors can be closed. */
static void leave_in_child(void *context)
{
    ndm_region *region = context;
    const uint64_t holder = ndm_i_owner_holder(&region->owner);
    const bool quiet = holder == ndm_i_this_thread || holder == NDM_I_RELEASED;
    ndm_i_fork_remove(&region->at_fork);
    ndm_i_file_abandon(&region->data);
    if (quiet) {
        shut(region);
    } else if (holder != NDM_I_CLOSED) {
        ndm_i_file_abandon(&region->slots.table);
        ndm_i_file_abandon(&region->leases.file);
    }
    region->left = true;
}

/* `path` and an ending, to be freed; NULL: no memory, or no path. */
static char *beside(const char *path, const char *ending)
{
    char *name = path ? malloc(strlen(path) + strlen(ending) + 1) : NULL;
    return name ? strcat(strcpy(name, path), ending) : NULL;
}

/* A region that has no files yet. */
static void prepare(ndm_region *region, const ndm_options *options)
{
    region->forget_from = options->cache_limit == NDM_I_UNLIMITED ? UINT64_MAX : FORGET_FROM;
    region->unit_shift = (unsigned)__builtin_ctzll(options->alignment);
    region->max_capacity = options->max_capacity;
    region->leases.file.fd = -1;
    atomic_init(&region->holders, 2);
    ndm_i_extents_init(&region->extents);
    region->limbo = (ndm_i_limbo){.extents = &region->extents, .home = &region->home, .leases = &region->leases,
                                  .unit_shift = &region->unit_shift};
}

static ndm_region *region_new(const char *path, const char *directory, const ndm_options *options)
{
    if (check_options(options) != NDM_OK)
        return NULL;
    ndm_region *region = calloc(1, sizeof *region);
    char *slots_path = beside(path, ".slots"), *leases_path = beside(path, ".leases");
    if (!region || (path && (!slots_path || !leases_path))) {
        ndm_i_fail(NDM_ERR_MEMORY, "no memory for a region");
        goto fail;
    }
    if (!ndm_i_owner_init(&region->owner) || !ndm_i_home_init(&region->home, last_use)) {
        ndm_i_fail(NDM_ERR_MEMORY, "no memory for the owner");
        goto fail;
    }
    prepare(region, options);
    region->leases_path = leases_path;
    if (open_files(region, path, slots_path, directory, options) != NDM_OK)
        goto fail;
    region->initial_capacity = region->data.capacity;
    ndm_i_publish(region);
    region->at_fork = (ndm_i_fork_entry){.in_child = leave_in_child, .context = region};
    ndm_i_fork_add(&region->at_fork);
    free(slots_path);
    return region;

fail:
    if (region)
        ndm_i_owner_fini(&region->owner);
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

/* The region's handle, if it has one, is stale from now on. false: the owner is inside a call by handle on another thread,
 * and destroys the region at its end. */
static bool retire_handle(ndm_region *region)
{
    const uint64_t handle = atomic_load(&region->handle);
    if (handle != 0 && !ndm_i_handle_retire(handle))
        return false;
    atomic_store(&region->handle, 0);
    return true;
}

int ndm_region_is_closed(const ndm_region *region) { return ndm_i_region_is_closed(region); }

int ndm_region_in_memory(const ndm_region *region) { return region && region->data.in_memory; }

void ndm_region_destroy(ndm_region *region)
{
    if (!region)
        return;
    if (!ndm_i_is_process(region->owner.process)) {
        if (!region->left) /* a raw clone() ran no handlers */
            leave_in_child(region);
        let_go(region);
        return;
    }
    if (!retire_handle(region))
        return;
    if (ndm_i_owner_close(&region->owner))
        shut(region);
    let_go(region);
}

int ndm_region_close(ndm_region *region)
{
    if (ndm_i_region_is_closed(region))
        return NDM_OK;
    const int status = ndm_i_enter(region);
    if (status == NDM_ERR_CLOSED) /* meanwhile, by its owner */
        return NDM_OK;
    /* a write-back that failed is reported, and the region closes all the same */
    if (status != NDM_ERR_WRONG_THREAD && retire_handle(region) && ndm_i_owner_close(&region->owner))
        shut(region);
    return status;
}

/* ---- who owns it ---------------------------------------------------------------------------------------- */

int ndm_region_release_ownership(ndm_region *region)
{
    const int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    const uint64_t handle = atomic_load(&region->handle);
    if (handle != 0)
        ndm_i_handle_pass(handle, NDM_I_RELEASED);
    ndm_i_owner_release(&region->owner);
    return NDM_OK;
}

/* A thread that was joined, as Python's are, may still have to end for the system. */
enum { ADOPT_TRIES = 100, ADOPT_PAUSE_NS = 1000000 };

int ndm_region_adopt(ndm_region *region)
{
    if (ndm_i_region_is_closed(region))
        return ndm_i_fail(NDM_ERR_CLOSED, "the region is closed");
    int refused = ndm_i_owner_adopt(&region->owner);
    for (int tries = 1; refused == EPERM && tries < ADOPT_TRIES && ndm_i_is_process(region->owner.process); tries++) {
        nanosleep(&(struct timespec){.tv_nsec = ADOPT_PAUSE_NS}, NULL);
        refused = ndm_i_owner_adopt(&region->owner);
    }
    if (refused == ENOMEM)
        return ndm_i_fail(NDM_ERR_MEMORY, "no memory for the owner");
    if (refused)
        return ndm_i_fail(NDM_ERR_WRONG_THREAD, "the region has an owner, which lives and has not released it");
    const uint64_t handle = atomic_load(&region->handle);
    if (handle != 0)
        ndm_i_handle_pass(handle, ndm_i_this_thread);
    return NDM_OK;
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
