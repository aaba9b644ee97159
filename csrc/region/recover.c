/* Taking over what a dead owner left: every value that was written stays under its slot, and every freed one that a
 * living reader leases stays where it is. */
#include "region/recover.h"

#include "os/status.h"

#include <errno.h>
#include <stdlib.h>

typedef struct {
    uint64_t offset, size;
    uint32_t slot; /* NDM_I_NO_SLOT: a place that is leased, no value's any more */
} found;

static int by_offset(const void *a, const void *b)
{
    const uint64_t x = ((const found *)a)->offset, y = ((const found *)b)->offset;
    return (x > y) - (x < y);
}

static int torn(const char *how) { return (int)ndm_i_of_file(NDM_FILE_SLOTS, ndm_i_fail_io(EUCLEAN, how)); }

static bool fits(const ndm_region *region, uint64_t offset, uint64_t size)
{
    return size <= region->data.capacity && offset <= region->data.capacity - size;
}

/* Nothing has been overwritten yet, and a reader may have leased the value before the owner began. Later it cannot. */
static bool may_be_leased(ndm_region *region, uint32_t slot, const ndm_i_record *record)
{
    return ndm_i_word(&ndm_i_slots_header(&region->slots)->moved) == 0 &&
           ndm_i_leases_has(&region->leases, slot, ndm_i_record_generation(record));
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
    if (ndm_i_record_state(record) != NDM_I_MOVING || ndm_i_record_offset(record) != from ||
        may_be_leased(region, (uint32_t)(number - 1), record)) {
        ndm_i_slots_move_cancel(&region->slots, (uint32_t)(number - 1));
        return NDM_OK;
    }
    const uint64_t unit = (uint64_t)1 << region->unit_shift;
    if (from == to || !fits(region, from, size) || !fits(region, to, size) || to % unit != 0 ||
        ndm_i_word(&header->moved) > size)
        return torn("the slot table is torn: a value was moved to no place");
    ndm_i_grains_adopt(&region->store.grains, from, size);
    ndm_i_grains_adopt(&region->store.grains, to, size);
    int status = ndm_i_store_move(&region->store, from, to, size, &header->moved);
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
        if (size == 0 && offset != 0)
            return torn("the slot table is torn: an empty value has a place");
        values[(*count)++] = (found){offset, size, (uint32_t)i};
    }
    qsort(values, *count, sizeof *values, by_offset);
    return NDM_OK;
}

/* Take an extent for each value, in order; the gaps between become free. */
static int take_extents(ndm_region *region, const found *values, uint64_t count)
{
    int status = NDM_OK;
    for (uint64_t i = 0; i < count && status == NDM_OK; i++) {
        if (values[i].size > 0 && values[i].offset >> region->unit_shift < region->extents.mark)
            return torn("the slot table is torn: two values overlap");
        status = ndm_i_adopt(region, values[i].offset, values[i].size, values[i].slot);
    }
    ndm_i_grains_adopt_rest(&region->store.grains, region->data.capacity);
    return status;
}

/* ---- leases --------------------------------------------------------------------------------------------- */

/* If the leases file is missing or is not one, the first share() makes it. */
int ndm_i_join_leases(ndm_region *region)
{
    if (!region->leases_path)
        return NDM_OK;
    const int status = ndm_i_leases_join(&region->leases, region->leases_path, true);
    const int refused = status == NDM_ERR_IO ? ndm_last_error()->os_errno : 0;
    return refused == ENOENT || refused == EINVAL ? NDM_OK : status;
}

static int by_start(const void *a, const void *b)
{
    const uint64_t x = ((const ndm_i_span *)a)->offset, y = ((const ndm_i_span *)b)->offset;
    return (x > y) - (x < y);
}

/* Widen the places to whole units and sort them; those that are not within the file are left out. */
static uint64_t in_units(const ndm_region *region, ndm_i_span *places, uint64_t count)
{
    const uint64_t unit = (uint64_t)1 << region->unit_shift;
    uint64_t good = 0;
    for (uint64_t i = 0; i < count; i++) {
        const ndm_i_span place = places[i];
        if (place.size == 0 || !fits(region, place.offset, place.size))
            continue;
        const uint64_t start = place.offset & ~(unit - 1), end = (place.offset + place.size + unit - 1) & ~(unit - 1);
        places[good++] = (ndm_i_span){start, end - start};
    }
    qsort(places, good, sizeof *places, by_start);
    return good;
}

/* Leave out what touches a value: it is a lease of that value, or no lease of ours. Both are in order. */
static uint64_t without_values(const ndm_region *region, ndm_i_span *places, uint64_t places_count, const found *values,
                               uint64_t count)
{
    uint64_t good = 0, next = 0;
    for (uint64_t i = 0; i < places_count; i++) {
        const uint64_t end = places[i].offset + places[i].size;
        while (next < count && values[next].offset + (ndm_i_units(region, values[next].size) << region->unit_shift) <=
                                   places[i].offset)
            next++;
        uint64_t at = next;
        while (at < count && values[at].offset < end && values[at].size == 0)
            at++;
        if (at == count || values[at].offset >= end)
            places[good++] = places[i];
    }
    return good;
}

/* Join places that overlap: several leases of one value. */
static uint64_t joined(ndm_i_span *places, uint64_t count)
{
    uint64_t good = 0;
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t end = places[i].offset + places[i].size;
        ndm_i_span *last = good > 0 ? &places[good - 1] : NULL;
        if (!last || places[i].offset >= last->offset + last->size)
            places[good++] = places[i];
        else if (end > last->offset + last->size)
            last->size = end - last->offset;
    }
    return good;
}

/* Add to the sorted values the places that leases keep besides. */
static int add_leased(ndm_region *region, found *values, uint64_t *count)
{
    ndm_i_span *places = malloc(NDM_I_LEASES * sizeof *places);
    if (!places)
        return ndm_i_fail(NDM_ERR_MEMORY, "no memory to recover the region");
    const int64_t leased = ndm_i_leases_places(&region->leases, places);
    if (leased < 0) {
        free(places);
        return (int)leased;
    }
    uint64_t kept = in_units(region, places, (uint64_t)leased);
    kept = joined(places, without_values(region, places, kept, values, *count));
    for (uint64_t i = 0; i < kept; i++)
        values[(*count)++] = (found){places[i].offset, places[i].size, NDM_I_NO_SLOT};
    free(places);
    if (kept > 0)
        qsort(values, *count, sizeof *values, by_offset);
    return NDM_OK;
}

int64_t ndm_i_leased_before(ndm_region *region, ndm_i_span *places)
{
    atomic_thread_fence(memory_order_seq_cst); /* the incarnation has been taken back: see leases.h */
    ndm_i_leases_reap(&region->leases);
    const int64_t count = ndm_i_leases_places(&region->leases, places);
    return count < 0 ? count : (int64_t)joined(places, in_units(region, places, (uint64_t)count));
}

int ndm_i_keep_places(ndm_region *region, const ndm_i_span *places, uint64_t count)
{
    found *values = malloc(count * sizeof *values);
    if (!values)
        return ndm_i_fail(NDM_ERR_MEMORY, "no memory to note leased extents");
    for (uint64_t i = 0; i < count; i++)
        values[i] = (found){places[i].offset, places[i].size, NDM_I_NO_SLOT};
    const int status = take_extents(region, values, count);
    free(values);
    return status;
}

/* ---- the whole ------------------------------------------------------------------------------------------ */

int ndm_i_recover(ndm_region *region)
{
    region->leases.incarnation = ndm_i_word(&ndm_i_slots_header(&region->slots)->incarnation);
    ndm_i_leases_reap(&region->leases);
    int status = finish_move(region);
    if (status != NDM_OK)
        return status;
    uint64_t count;
    found *values = malloc((region->slots.count + NDM_I_LEASES) * sizeof *values);
    if (!values)
        return ndm_i_fail(NDM_ERR_MEMORY, "no memory to recover the region");
    if ((status = list_values(region, values, &count)) != NDM_OK ||
        (status = add_leased(region, values, &count)) != NDM_OK ||
        (status = take_extents(region, values, count)) != NDM_OK)
        goto end;
    ndm_i_slots_rebuild(&region->slots);

end:
    free(values);
    return status;
}
