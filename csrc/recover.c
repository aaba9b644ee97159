/* Taking over what a dead owner left: every value that was written stays under its slot. */
#include "region.h"

#include "status.h"

#include <errno.h>
#include <stdlib.h>

typedef struct {
    uint64_t offset, size;
    uint32_t slot;
} found;

static int by_offset(const void *a, const void *b)
{
    const uint64_t x = ((const found *)a)->offset, y = ((const found *)b)->offset;
    return (x > y) - (x < y);
}

static int torn(const char *how) { return ndm_i_fail_io(EUCLEAN, how); }

static bool fits(const ndm_region *region, uint64_t offset, uint64_t size)
{
    return size <= region->data.capacity && offset <= region->data.capacity - size;
}

/* A move that the owner did not finish goes on from where it stopped. */
static int finish_move(ndm_region *region)
{
    ndm_i_header *header = ndm_i_slots_header(&region->slots);
    const uint64_t number = ndm_i_word(&header->move_slot);
    if (number == 0)
        return NDM_OK;
    const ndm_i_record *record = ndm_i_slots_record(&region->slots, (int64_t)number - 1);
    const uint64_t from = ndm_i_word(&header->move_from), to = ndm_i_word(&header->move_to);
    if (!record)
        return torn("the slot table is torn: a value was moved that has no record");
    const uint64_t size = ndm_i_record_size(record);
    if (ndm_i_record_state(record) != NDM_I_MOVING || ndm_i_record_offset(record) != from) {
        ndm_i_slots_move_cancel(&region->slots, (uint32_t)(number - 1));
        return NDM_OK;
    }
    const uint64_t unit = (uint64_t)1 << region->unit_shift;
    if (from == to || !fits(region, from, size) || !fits(region, to, size) || to % unit != 0 ||
        ndm_i_word(&header->moved) > size)
        return torn("the slot table is torn: a value was moved to no place");
    ndm_i_grains_adopt(&region->grains, from, size);
    ndm_i_grains_adopt(&region->grains, to, size);
    int status = ndm_i_grains_move(&region->grains, from, to, size, &header->moved);
    if (status == NDM_OK)
        ndm_i_slots_move_end(&region->slots, (uint32_t)(number - 1), to, NDM_I_NONE);
    return status;
}

/* List the values; unfinished ones are not among them. */
static int list_values(ndm_region *region, found *values, uint64_t *count)
{
    *count = 0;
    for (uint64_t i = 0; i < region->slots.count; i++) {
        const ndm_i_record *record = ndm_i_slots_record(&region->slots, (int64_t)i);
        const uint64_t offset = ndm_i_record_offset(record), size = ndm_i_record_size(record);
        if (ndm_i_record_state(record) > NDM_I_MOVING)
            return torn("the slot table is torn: a record has no known state");
        if (ndm_i_record_state(record) == NDM_I_MOVING)
            return torn("the slot table is torn: a value is on the move to no place");
        if (ndm_i_record_state(record) != NDM_I_LIVE)
            continue;
        if (!fits(region, offset, size))
            return torn("the slot table is torn: a value lies past the end of the file");
        if (offset & (((uint64_t)1 << region->unit_shift) - 1))
            return torn("the slot table is torn: a value is not aligned");
        values[(*count)++] = (found){offset, size, (uint32_t)i};
    }
    qsort(values, *count, sizeof *values, by_offset);
    return NDM_OK;
}

/* Take an extent for each value, in order, and for each gap between; the gaps are released in the end. */
static int take_extents(ndm_region *region, const found *values, uint64_t count)
{
    ndm_i_extents *extents = &region->extents;
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t units = ndm_i_units(region, values[i].size), start = values[i].offset >> region->unit_shift;
        if (units == 0)
            continue;
        if (start < extents->mark)
            return torn("the slot table is torn: two values overlap");
        if (start > extents->mark) {
            if (!ndm_i_extents_reserve(extents))
                return ndm_i_fail(NDM_ERR_MEMORY, "no memory for an extent");
            const ndm_i_place gap = {.offset = extents->mark, .hole = NDM_I_NONE};
            ndm_i_extents_take(extents, gap, start - extents->mark, NDM_I_NONE);
        }
        if (!ndm_i_extents_reserve(extents))
            return ndm_i_fail(NDM_ERR_MEMORY, "no memory for an extent");
        const ndm_i_place place = {.offset = start, .hole = NDM_I_NONE};
        ndm_i_slots_set_extent(&region->slots, values[i].slot,
                               ndm_i_extents_take(extents, place, units, values[i].slot));
        ndm_i_grains_adopt(&region->grains, values[i].offset, values[i].size);
    }
    for (uint32_t e = ndm_i_extents_first(extents); e != NDM_I_NONE;) {
        const uint32_t next = ndm_i_extents_next(extents, e); /* a value: it outlives the gap before it */
        if (ndm_i_extents_tag(extents, e) == NDM_I_NONE)
            ndm_i_extents_release(extents, e);
        e = next;
    }
    ndm_i_grains_adopt_rest(&region->grains);
    return NDM_OK;
}

/* Readers that live keep what they leased. Of a file that is missing or none, the first share() sees to. */
static void resume_leases(ndm_region *region)
{
    if (region->leases_path && ndm_i_leases_join(&region->leases, region->leases_path) == NDM_OK)
        ndm_i_leases_reap(&region->leases);
}

int ndm_i_recover(ndm_region *region)
{
    int status = finish_move(region);
    if (status != NDM_OK)
        return status;
    resume_leases(region);
    uint64_t count;
    found *values = malloc((region->slots.count + 1) * sizeof *values);
    if (!values)
        return ndm_i_fail(NDM_ERR_MEMORY, "no memory to recover the region");
    if ((status = list_values(region, values, &count)) != NDM_OK ||
        (status = take_extents(region, values, count)) != NDM_OK)
        goto end;
    ndm_i_slots_rebuild(&region->slots);
    for (uint64_t i = 0; i < count; i++) {
        const uint8_t engine = ndm_i_record_engine(ndm_i_slots_record(&region->slots, values[i].slot));
        ndm_i_count_value(region, values[i].offset, values[i].size, engine);
        if (values[i].size == 0)
            ndm_i_slots_set_extent(&region->slots, values[i].slot, NDM_I_NONE);
    }

end:
    free(values);
    return status;
}
