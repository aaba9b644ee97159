/* The control plane as cffi calls it. Each function takes the place for the details of a refusal: a signal handler, or a
 * finalizer, may use the core itself before Python code can look at ndm_last_error(). cffi's declarations are read from the
 * lines between the marks. */
#ifndef NDM_PYTHON_CONTROL_H
#define NDM_PYTHON_CONTROL_H

#include "refusals.h"

#include <stdlib.h>

/* [control: the declarations] */
static int64_t control_info(ndm_region *region, ndm_info *out);
static void control_forget(int64_t details);
static int64_t control_stats(ndm_region *region, ndm_stats *out, ndm_error *refusal);
static int64_t control_trim(ndm_region *region, ndm_error *refusal);
static int64_t control_trim_some(ndm_region *region, uint64_t budget, ndm_error *refusal);
static int64_t control_compact(ndm_region *region, uint64_t budget, ndm_compaction *out, ndm_error *refusal);
static int64_t control_flush(ndm_region *region, ndm_error *refusal);
static int64_t control_close(ndm_region *region, ndm_error *refusal);
static int64_t control_max_capacity(ndm_region *region, uint64_t max_capacity, ndm_error *refusal);
static int64_t control_allow_leases(ndm_region *region, ndm_error *refusal);
static int64_t control_handle(ndm_region *region, ndm_error *refusal);
static int64_t control_release_ownership(ndm_region *region, ndm_error *refusal);
static int64_t control_adopt(ndm_region *region, ndm_error *refusal);
static int64_t control_reader_stats(ndm_reader *reader, ndm_reader_figures *out, ndm_error *refusal);
static int64_t control_reader_leases(ndm_reader *reader, ndm_leased *places, uint64_t capacity, ndm_error *refusal);
static int64_t control_governor_add_engine(ndm_governor *governor, int64_t engine, uint64_t limit, int spillable,
                                           ndm_error *refusal);
static int64_t control_governor_set_limit(ndm_governor *governor, int64_t engine, uint64_t limit, ndm_error *refusal);
static int64_t control_governor_set_ceiling(ndm_governor *governor, uint64_t ceiling, uint64_t headroom,
                                            ndm_error *refusal);
static int64_t control_governor_pressure(ndm_governor *governor, int64_t engine, ndm_error *refusal);
static int64_t control_governor_note_real(ndm_governor *governor, uint64_t bytes, uint32_t percent, ndm_error *refusal);
static int64_t control_governor_ask(ndm_governor *governor, int64_t engine, uint64_t size, ndm_error *refusal);
static int64_t control_governor_snapshot(ndm_governor *governor, ndm_governor_figures *out, ndm_error *refusal);
static int64_t control_governor_check(ndm_governor *governor, ndm_error *refusal);
static int64_t control_governor_handle(ndm_governor *governor, ndm_error *refusal);
/* [/control] */

/* For figures that are asked for often: no place for details is needed where nothing is refused. 0, or the address of a copy of
 * the details, to be forgotten; -1: no memory for one. */
static int64_t control_info(ndm_region *region, ndm_info *out)
{
    if (ndm_region_info(region, out) == NDM_OK)
        return 0;
    ndm_error *details = malloc(sizeof *details);
    if (!details)
        return -1;
    *details = *ndm_last_error();
    return (int64_t)(intptr_t)details;
}

static void control_forget(int64_t details) { free((void *)(intptr_t)details); }

static int64_t control_stats(ndm_region *region, ndm_stats *out, ndm_error *refusal)
{
    return ndm_i_noted(ndm_region_stats(region, out), refusal);
}

static int64_t control_trim(ndm_region *region, ndm_error *refusal) { return ndm_i_noted(ndm_region_trim(region), refusal); }

static int64_t control_trim_some(ndm_region *region, uint64_t budget, ndm_error *refusal)
{
    return ndm_i_noted(ndm_region_trim_some(region, budget), refusal);
}

static int64_t control_compact(ndm_region *region, uint64_t budget, ndm_compaction *out, ndm_error *refusal)
{
    return ndm_i_noted(ndm_region_compact(region, budget, out), refusal);
}

static int64_t control_flush(ndm_region *region, ndm_error *refusal) { return ndm_i_noted(ndm_region_flush(region), refusal); }

static int64_t control_close(ndm_region *region, ndm_error *refusal) { return ndm_i_noted(ndm_region_close(region), refusal); }

static int64_t control_max_capacity(ndm_region *region, uint64_t max_capacity, ndm_error *refusal)
{
    return ndm_i_noted(ndm_region_set_max_capacity(region, max_capacity), refusal);
}

static int64_t control_allow_leases(ndm_region *region, ndm_error *refusal)
{
    return ndm_i_noted(ndm_region_allow_leases(region), refusal);
}

static int64_t control_handle(ndm_region *region, ndm_error *refusal)
{
    const uint64_t handle = ndm_region_handle(region); /* below 2^63 */
    return ndm_i_noted(handle ? (int64_t)handle : -1, refusal);
}

static int64_t control_release_ownership(ndm_region *region, ndm_error *refusal)
{
    return ndm_i_noted(ndm_region_release_ownership(region), refusal);
}

static int64_t control_adopt(ndm_region *region, ndm_error *refusal) { return ndm_i_noted(ndm_region_adopt(region), refusal); }

static int64_t control_reader_stats(ndm_reader *reader, ndm_reader_figures *out, ndm_error *refusal)
{
    return ndm_i_noted(ndm_reader_stats(reader, out), refusal);
}

static int64_t control_reader_leases(ndm_reader *reader, ndm_leased *places, uint64_t capacity, ndm_error *refusal)
{
    return ndm_i_noted(ndm_reader_leases(reader, places, capacity), refusal);
}

static int64_t control_governor_add_engine(ndm_governor *governor, int64_t engine, uint64_t limit, int spillable,
                                           ndm_error *refusal)
{
    return ndm_i_noted(ndm_governor_add_engine(governor, engine, limit, spillable), refusal);
}

static int64_t control_governor_set_limit(ndm_governor *governor, int64_t engine, uint64_t limit, ndm_error *refusal)
{
    return ndm_i_noted(ndm_governor_set_limit(governor, engine, limit), refusal);
}

static int64_t control_governor_set_ceiling(ndm_governor *governor, uint64_t ceiling, uint64_t headroom,
                                            ndm_error *refusal)
{
    return ndm_i_noted(ndm_governor_set_ceiling(governor, ceiling, headroom), refusal);
}

static int64_t control_governor_pressure(ndm_governor *governor, int64_t engine, ndm_error *refusal)
{
    return ndm_i_noted(ndm_governor_pressure(governor, engine), refusal);
}

static int64_t control_governor_note_real(ndm_governor *governor, uint64_t bytes, uint32_t percent, ndm_error *refusal)
{
    return ndm_i_noted(ndm_governor_note_real(governor, bytes, percent), refusal);
}

static int64_t control_governor_ask(ndm_governor *governor, int64_t engine, uint64_t size, ndm_error *refusal)
{
    return ndm_i_noted(ndm_governor_ask(governor, engine, size), refusal);
}

static int64_t control_governor_snapshot(ndm_governor *governor, ndm_governor_figures *out, ndm_error *refusal)
{
    return ndm_i_noted(ndm_governor_snapshot(governor, out), refusal);
}

static int64_t control_governor_check(ndm_governor *governor, ndm_error *refusal)
{
    return ndm_i_noted(ndm_governor_check(governor), refusal);
}

static int64_t control_governor_handle(ndm_governor *governor, ndm_error *refusal)
{
    const uint64_t handle = ndm_governor_handle(governor); /* below 2^63 */
    return ndm_i_noted(handle ? (int64_t)handle : -1, refusal);
}

#endif
