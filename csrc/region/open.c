/* A region's life: opening, closing, handing over, and its ceiling. */
#define _GNU_SOURCE
#include "region/ledger.h"

#include "os/status.h"
#include "region/anew.h"
#include "region/recover.h"
#include "store/handles.h"
#include "store/kinship.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- opening and closing -------------------------------------------------------------------------------- */

static void let_go(ndm_region *region)
{
    if (atomic_fetch_sub(&region->holders, 1) > 1)
        return;
    if (ndm_i_is_process(region->owner.process)) /* a child's copy of the lock may be held */
        ndm_i_gate_fini(&region->gate);
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
    ndm_i_file_close(&region->data, NULL);
    ndm_i_fork_remove(&region->at_fork);
    let_go(region);
}

static int check_options(const ndm_options *options)
{
    if (options->max_capacity == 0)
        return ndm_i_fail(NDM_ERR_ARGUMENT, "max_capacity must be positive");
    if (options->max_capacity > INT64_MAX)
        return ndm_i_fail(NDM_ERR_ARGUMENT, "max_capacity must be below 2^63");
    if (!ndm_i_is_alignment(options->alignment))
        return ndm_i_fail(NDM_ERR_ARGUMENT, "alignment must be a power of two, 1 to 4096");
    if (options->ownership > NDM_OWNED_BY_PROCESS)
        return ndm_i_fail(NDM_ERR_ARGUMENT, "ownership must be a thread's or a process's");
    return NDM_OK;
}

static int of_table(int os_errno, const char *message)
{
    return (int)ndm_i_of_file(NDM_FILE_SLOTS, ndm_i_fail_io(os_errno, message));
}

/* The data file has data, or the table values. What may be done with them? */
static int refuse_strangers(const ndm_region *region, bool has_data, bool recover)
{
    const ndm_i_slots *slots = &region->slots;
    const bool marked = ndm_i_identity_is_set(ndm_i_identity_of(&region->data));
    if (slots->found == NDM_I_NO_TABLE || slots->found == NDM_I_VACANT_TABLE) {
        if (!has_data || ndm_i_kinship_of(&slots->before, &region->data) == NDM_I_SAME)
            return NDM_OK;
        if (!marked)
            return ndm_i_fail_io(EEXIST, "the file holds data that no overflow region wrote, or its slot table was "
                                         "removed: put path.slots back, or remove the file");
        if (recover && slots->found == NDM_I_NO_TABLE)
            return of_table(ENOENT, "the slot table of the region is missing: put it back, or open without recover to "
                                    "start empty");
        return NDM_OK;
    }
    const ndm_i_kinship kinship = ndm_i_kinship_of(&slots->before, &region->data);
    const bool live = slots->found == NDM_I_TABLE && ndm_i_word(&slots->before.live_bytes) > 0;
    if (!has_data && (kinship == NDM_I_LOST || kinship == NDM_I_STRANGERS)) /* the file that it speaks of is gone */
        return recover && live ? of_table(EUCLEAN, "the data file that the slot table describes is gone") : NDM_OK;
    if (kinship == NDM_I_LIVE_COPY && !recover)
        return NDM_OK;
    return (int)ndm_i_of_file(NDM_FILE_SLOTS, ndm_i_kinship_check(kinship));
}

/* Are there values to be taken over? */
static bool has_values(const ndm_region *region)
{
    if (region->slots.found != NDM_I_TABLE && region->slots.found != NDM_I_OLDER_TABLE)
        return false;
    const ndm_i_kinship kinship = ndm_i_kinship_of(&region->slots.before, &region->data);
    return kinship != NDM_I_LOST && kinship != NDM_I_STRANGERS;
}

static int take_over(ndm_region *region, const ndm_options *options)
{
    int status = ndm_i_slots_adopt(&region->slots, &region->data);
    if (status == NDM_OK)
        status = ndm_i_file_start(&region->data, region->data.capacity, ndm_i_ceiling(options->max_capacity));
    if (status == NDM_OK)
        status = ndm_i_start_store(region, options);
    if (status != NDM_OK)
        return status;
    region->unit_shift = (unsigned)__builtin_ctzll(ndm_i_slots_header(&region->slots)->alignment);
    return ndm_i_recover(region);
}

/* The initial capacity counts where there is no file yet, or an empty one. */
static int check_initial(const ndm_options *options)
{
    if (options->initial_capacity == 0)
        return ndm_i_fail(NDM_ERR_ARGUMENT, "initial_capacity must be positive");
    if (options->initial_capacity > options->max_capacity)
        return ndm_i_fail(NDM_ERR_ARGUMENT, "initial_capacity must not exceed max_capacity");
    return NDM_OK;
}

static int open_data(ndm_region *region, const char *path, const char *directory, const ndm_options *options)
{
    const int refused = check_initial(options);
    if (!path)
        return refused ? refused : ndm_i_file_open_unnamed(&region->data, directory);
    int status = ndm_i_file_open(&region->data, path, !refused, NDM_I_LOCK_FILE);
    if (refused && status == NDM_ERR_IO && ndm_last_error()->os_errno == ENOENT)
        return check_initial(options);
    if (refused && status == NDM_OK && region->data.capacity == 0) {
        ndm_i_file_close(&region->data, NULL);
        return check_initial(options);
    }
    return status;
}

static int open_slots(ndm_region *region, const char *slots_path, bool recover)
{
    const int has_data = slots_path ? ndm_i_file_has_data(&region->data) : 0;
    if (has_data < 0)
        return has_data;
    const bool marked = has_data && ndm_i_identity_is_set(ndm_i_identity_of(&region->data));
    int status = ndm_i_slots_open(&region->slots, slots_path, !has_data || (marked && !recover));
    const bool missing = has_data && status == NDM_ERR_IO && ndm_last_error()->os_errno == ENOENT;
    if (status == NDM_OK || missing) {
        status = slots_path ? refuse_strangers(region, has_data, recover) : NDM_OK;
        if (status != NDM_OK)
            ndm_i_slots_close(&region->slots, region->slots.table.created ? slots_path : NULL);
    }
    return status;
}

/* Open both files and, once nothing can be refused any more, empty or adopt them. */
static int open_files(ndm_region *region, const char *path, const char *slots_path, const char *directory,
                      const ndm_options *options)
{
    int status = open_data(region, path, directory, options);
    if (status != NDM_OK)
        return status;
    if ((status = open_slots(region, slots_path, options->recover)) != NDM_OK)
        goto fail;
    status = ndm_i_join_leases(region);
    if (status == NDM_OK)
        status = options->recover && has_values(region) ? take_over(region, options) : ndm_i_start_anew(region, options);
    if (status == NDM_OK) {
        atomic_store(&ndm_i_slots_header(&region->slots)->has_leases, region->leases.file.fd >= 0);
        return NDM_OK;
    }

    ndm_i_limbo_forget(&region->limbo);
    ndm_i_leases_close(&region->leases);
    ndm_i_store_fini(&region->store);
    ndm_i_extents_fini(&region->extents);
    ndm_i_slots_close(&region->slots, region->slots.table.created ? slots_path : NULL);
fail:
    ndm_i_file_close(&region->data, region->data.created ? path : NULL);
    return status;
}

/* Let go of the data file's mapping, and of the home, unless that has been done. Views keep them. */
static void unmap(ndm_region *region)
{
    ndm_i_fork_bar();
    ndm_i_file_unmap(&region->data);
    const bool stays = !region->home_left;
    region->home_left = true;
    if (stays)
        ndm_i_home_leave(&region->home); /* the last thing: the region may go */
    ndm_i_fork_let();
}

/* Everything but the data file, which goes with the last view. A child that is forked in the midst of it lets go of what is
 * left. */
static void shut(ndm_region *region)
{
    ndm_i_limbo_forget(&region->limbo);
    ndm_i_leases_close(&region->leases);
    ndm_i_slots_seal(&region->slots, &region->data);
    ndm_i_slots_close(&region->slots, NULL);
    ndm_i_extents_fini(&region->extents);
    ndm_i_store_fini(&region->store);
    unmap(region);
}

/* In a forked child, on its only thread: let go of the copies of what the parent has open. Views that the child inherited
 * keep their mapping. The books of a region that another thread owns, or opens, or shuts, may be half-written, and stay in
 * the child's memory. Its files are as they are noted, if the fork waited for that (fork.h); otherwise its mappings stay. */
static void leave(ndm_region *region, bool waited)
{
    const uint64_t holder = ndm_i_owner_holder(&region->owner);
    region->left = true;
    ndm_i_fork_remove(&region->at_fork);
    ndm_i_file_abandon(&region->data);
    if (holder == ndm_i_this_thread || holder == NDM_I_RELEASED) {
        shut(region);
        return;
    }
    ndm_i_file_abandon(&region->slots.table);
    ndm_i_file_abandon(&region->leases.file);
    if (!waited)
        return;
    ndm_i_writer_leave_in_child(&region->store.writer);
    ndm_i_file_unmap(&region->slots.table);
    unmap(region);
}

static void leave_in_child(void *region) { leave(region, true); }

/* `path` and an ending, to be freed; NULL: no memory, or no path. */
static char *beside(const char *path, const char *ending)
{
    char *name = path ? malloc(strlen(path) + strlen(ending) + 1) : NULL;
    return name ? strcat(strcpy(name, path), ending) : NULL;
}

/* A region that has no files yet. */
static void prepare(ndm_region *region, const ndm_options *options)
{
    region->unit_shift = (unsigned)__builtin_ctzll(options->alignment);
    region->max_capacity = options->max_capacity;
    region->data.fd = region->slots.table.fd = region->leases.file.fd = -1;
    atomic_init(&region->holders, 2);
    if (options->ownership == NDM_OWNED_BY_PROCESS) {
        ndm_i_gate_share(&region->gate);
        ndm_i_owner_share(&region->owner);
    }
    region->at_fork = (ndm_i_fork_entry){.in_child = leave_in_child, .context = region};
    ndm_i_extents_init(&region->extents);
    region->limbo = (ndm_i_limbo){.extents = &region->extents, .home = &region->home, .leases = &region->leases,
                                  .unit_shift = &region->unit_shift};
}

static ndm_region *region_new(const char *path, const char *directory, const ndm_options *options)
{
    if (check_options(options) != NDM_OK)
        return NULL;
    const ndm_error before = *ndm_last_error();
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
    ndm_i_fork_add(&region->at_fork);
    if (open_files(region, path, slots_path, directory, options) != NDM_OK) {
        ndm_i_fork_remove(&region->at_fork);
        goto fail;
    }
    region->initial_capacity = region->data.capacity;
    ndm_i_publish(region);
    free(slots_path);
    ndm_i_ended(NDM_OK, &before);
    return region;

fail:
    if (region) {
        ndm_i_gate_fini(&region->gate);
        ndm_i_owner_fini(&region->owner);
    }
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

/* The region's handle, if it has one, is stale from now on. false: another thread is inside a call by handle, and destroys
 * the region at its end. */
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
            leave(region, false);
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
    const ndm_error before = *ndm_last_error();
    int status = ndm_i_enter_to_look(region);
    if (status == NDM_ERR_CLOSED) /* meanwhile, by its owner */
        return (int)ndm_i_ended(NDM_OK, &before);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    status = ndm_i_check_written(region); /* it is reported, and the region closes all the same */
    /* Other threads may be inside calls by the handle of a shared region: it goes with the region. */
    if ((region->gate.shared || retire_handle(region)) && ndm_i_owner_close(&region->owner)) {
        ndm_i_gate_await(&region->gate); /* nobody new comes in */
        shut(region);
    }
    return status;
}

/* ---- who owns it ---------------------------------------------------------------------------------------- */

int ndm_region_release_ownership(ndm_region *region)
{
    const int status = ndm_i_enter(region);
    if (status != NDM_OK)
        return status;
    NDM_I_LEAVES(region);
    if (region->gate.shared)
        return NDM_OK;
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
    if (region->gate.shared)
        return ndm_region_release_ownership(region); /* neither changes anything */
    int refused = ndm_i_owner_adopt(&region->owner);
    for (int tries = 1; refused == EPERM && tries < ADOPT_TRIES && ndm_i_is_process(region->owner.process) &&
                        !ndm_i_region_is_closed(region); tries++) {
        nanosleep(&(struct timespec){.tv_nsec = ADOPT_PAUSE_NS}, NULL);
        refused = ndm_i_owner_adopt(&region->owner);
    }
    if (refused == ENOMEM)
        return ndm_i_fail(NDM_ERR_MEMORY, "no memory for the owner");
    if (refused && ndm_i_region_is_closed(region))
        return ndm_i_fail(NDM_ERR_CLOSED, "the region is closed");
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
    NDM_I_LEAVES(region);
    if (max_capacity < region->max_capacity)
        return ndm_i_fail(NDM_ERR_ARGUMENT, "max_capacity can only be raised");
    if (max_capacity > INT64_MAX)
        return ndm_i_fail(NDM_ERR_ARGUMENT, "max_capacity must be below 2^63");
    region->max_capacity = max_capacity;
    ndm_i_publish(region);
    return NDM_OK;
}
