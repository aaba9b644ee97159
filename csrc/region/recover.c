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

/* A move that the owner did not finish. It goes on from where it stopped; or never happened, where `back`. */
typedef struct {
    uint64_t slot; /* UINT64_MAX: none */
    uint64_t from, to, size;
    bool back;
} move;

static bool overlap(uint64_t a, uint64_t b, uint64_t size) { return a < b ? b - a < size : a - b < size; }

static int look_at_move(ndm_region *region, move *moving)
{
    const ndm_i_header *header = ndm_i_slots_header(&region->slots);
    const uint64_t number = ndm_i_word(&header->move_slot), moved = ndm_i_word(&header->moved);
    *moving = (move){.slot = UINT64_MAX, .from = ndm_i_word(&header->move_from), .to = ndm_i_word(&header->move_to)};
    if (number == 0)
        return NDM_OK;
    if (number > region->slots.count)
        return torn("the slot table is torn: a value was moved that has no record");
    const ndm_i_record *record = ndm_i_slots_record(&region->slots, (int64_t)(number - 1));
    moving->slot = number - 1;
    moving->size = ndm_i_record_size(record);
    moving->back = ndm_i_record_state(record) != NDM_I_MOVING || ndm_i_record_offset(record) != moving->from ||
                  may_be_leased(region, (uint32_t)moving->slot, record);
    if (moving->back)
        return NDM_OK;
    const uint64_t unit = (uint64_t)1 << region->unit_shift;
    if (moving->from == moving->to || moved > moving->size || moving->from % unit != 0 || moving->to % unit != 0 ||
        !fits(region, moving->from, moving->size) || !fits(region, moving->to, moving->size))
        return torn("the slot table is torn: a value was moved to no place");
    if (moving->to > moving->from && overlap(moving->from, moving->to, moving->size)) /* it would overwrite itself */
        return torn("the slot table is torn: a value was moved over itself");
    return NDM_OK;
}

static int finish_move(ndm_region *region, const move *moving)
{
    const uint32_t slot = (uint32_t)moving->slot;
    if (moving->slot == UINT64_MAX)
        return NDM_OK;
    if (moving->back) {
        ndm_i_slots_move_cancel(&region->slots, slot);
        return NDM_OK;
    }
    ndm_i_grains_adopt(&region->store.grains, moving->from, moving->size);
    ndm_i_grains_adopt(&region->store.grains, moving->to, moving->size);
    int status = ndm_i_store_move(&region->store, moving->from, moving->to, moving->size, moving->to,
                                  &ndm_i_slots_header(&region->slots)->moved);
    if (status == NDM_OK)
        ndm_i_slots_move_end(&region->slots, slot, moving->to, NDM_I_NONE);
    return status;
}

/* List the values as they will be when the move has ended; unfinished ones are not among them. */
static int list_values(const ndm_region *region, const move *moving, found *values, uint64_t *count)
{
    *count = 0;
    for (uint64_t i = 0; i < region->slots.count; i++) {
        const ndm_i_record *record = ndm_i_slots_record(&region->slots, (int64_t)i);
        const uint64_t size = ndm_i_record_size(record);
        uint64_t offset = ndm_i_record_offset(record);
        if (ndm_i_record_state(record) > NDM_I_MOVING)
            return torn("the slot table is torn: a record has no known state");
        if (ndm_i_record_state(record) == NDM_I_MOVING && i != moving->slot)
            return torn("the slot table is torn: a value is on the move to no place");
        if (ndm_i_record_state(record) == NDM_I_MOVING && !moving->back)
            offset = moving->to;
        else if (ndm_i_record_state(record) != NDM_I_LIVE && ndm_i_record_state(record) != NDM_I_MOVING)
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

/* Do the sorted values lie apart, also from the place that a moved one comes from? */
static int check_apart(const ndm_region *region, const move *moving, const found *values, uint64_t count)
{
    const bool moves = moving->slot != UINT64_MAX && !moving->back;
    uint64_t mark = 0;
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t start = values[i].offset >> region->unit_shift;
        if (values[i].size == 0)
            continue;
        if (start < mark)
            return torn("the slot table is torn: two values overlap");
        mark = start + ndm_i_units(region, values[i].size);
        if (moves && values[i].slot != moving->slot && moving->from < values[i].offset + values[i].size &&
            values[i].offset < moving->from + moving->size)
            return torn("the slot table is torn: a value was moved out of another");
    }
    return NDM_OK;
}

/* Memory for the extents of the sorted values, and for the gaps between. */
static int reserve_extents(ndm_region *region, const found *values, uint64_t count)
{
    uint64_t nodes = 1, mark = 0; /* a gap is taken before it is given back */
    for (uint64_t i = 0; i < count; i++) {
        if (values[i].size == 0)
            continue;
        nodes += 1 + (values[i].offset >> region->unit_shift > mark);
        mark = (values[i].offset >> region->unit_shift) + ndm_i_units(region, values[i].size);
    }
    return ndm_i_extents_reserve_many(&region->extents, nodes) ? NDM_OK
                                                               : ndm_i_fail(NDM_ERR_MEMORY, "no memory for the extents");
}

/* Take an extent for each value, in order; the gaps between become free. Cannot fail after reserve_extents(), and a
 * limbo that has room for the leased ones. */
static int take_extents(ndm_region *region, const found *values, uint64_t count)
{
    int status = NDM_OK;
    for (uint64_t i = 0; i < count && status == NDM_OK; i++)
        status = ndm_i_adopt(region, values[i].offset, values[i].size, values[i].slot);
    ndm_i_grains_adopt_rest(&region->store.grains, region->data.capacity);
    ndm_i_limbo_drop_spare(&region->limbo);
    return status;
}

/* ---- leases --------------------------------------------------------------------------------------------- */

/* Without its leases file nobody knows what the readers of a table keep. Without readers nothing is kept. */
static int check_missing(ndm_region *region)
{
    if (ndm_i_word(&region->slots.before.has_leases) == 0 || region->data.capacity == 0)
        return NDM_OK;
    const bool alone = ndm_i_slots_bar_readers(&region->slots);
    ndm_i_slots_let_readers(&region->slots);
    return alone ? NDM_OK
                 : (int)ndm_i_of_file(NDM_FILE_LEASES,
                                      ndm_i_fail_io(ENOENT, "the leases file was removed while readers have the region "
                                                            "open, and tells no more what they lease: put it back, or "
                                                            "close the readers"));
}

/* If the leases file is missing or is not one, the first share() makes it. */
int ndm_i_join_leases(ndm_region *region)
{
    if (!region->leases_path)
        return NDM_OK;
    const int status = ndm_i_leases_join(&region->leases, region->leases_path, true);
    const int refused = status == NDM_ERR_IO ? ndm_last_error()->os_errno : 0;
    if (refused == ENOENT)
        return check_missing(region);
    return refused == EINVAL ? NDM_OK : status;
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
    return ndm_i_limbo_reserve(&region->limbo, kept) ? NDM_OK
                                                     : ndm_i_fail(NDM_ERR_MEMORY, "no memory to note leased extents");
}

int64_t ndm_i_leased_before(ndm_region *region, ndm_i_span *places)
{
    atomic_thread_fence(memory_order_seq_cst); /* the incarnation has been taken back: see leases.h */
    ndm_i_leases_reap(&region->leases);
    const int64_t count = ndm_i_leases_places(&region->leases, places);
    return count < 0 ? count : (int64_t)joined(places, in_units(region, places, (uint64_t)count));
}

int ndm_i_reserve_places(ndm_region *region, uint64_t count)
{
    return ndm_i_extents_reserve_many(&region->extents, 2 * count + 1) && ndm_i_limbo_reserve(&region->limbo, count)
               ? NDM_OK
               : ndm_i_fail(NDM_ERR_MEMORY, "no memory to note leased extents");
}

int ndm_i_keep_places(ndm_region *region, const ndm_i_span *places, uint64_t count)
{
    int status = NDM_OK;
    for (uint64_t i = 0; i < count && status == NDM_OK; i++)
        status = ndm_i_adopt(region, places[i].offset, places[i].size, NDM_I_NO_SLOT);
    ndm_i_grains_adopt_rest(&region->store.grains, region->data.capacity);
    ndm_i_limbo_drop_spare(&region->limbo);
    return status;
}

/* ---- the whole ------------------------------------------------------------------------------------------ */

/* Look at everything that the files say, and get the memory that is needed. Changes nothing in them. */
static int examine(ndm_region *region, move *moving, found *values, uint64_t *count)
{
    int status = look_at_move(region, moving);
    if (status == NDM_OK)
        status = list_values(region, moving, values, count);
    if (status == NDM_OK)
        status = check_apart(region, moving, values, *count);
    if (status == NDM_OK)
        status = add_leased(region, values, count);
    if (status == NDM_OK)
        status = reserve_extents(region, values, *count);
    return status;
}

int ndm_i_recover(ndm_region *region)
{
    move moving;
    uint64_t count;
    found *values = malloc((region->slots.count + NDM_I_LEASES) * sizeof *values);
    if (!values)
        return ndm_i_fail(NDM_ERR_MEMORY, "no memory to recover the region");
    region->leases.incarnation = ndm_i_word(&ndm_i_slots_header(&region->slots)->incarnation);
    ndm_i_leases_reap(&region->leases);
    int status = examine(region, &moving, values, &count);
    if (status == NDM_OK)
        status = finish_move(region, &moving);
    if (status == NDM_OK)
        status = take_extents(region, values, count);
    if (status == NDM_OK) {
        ndm_i_slots_rebuild(&region->slots);
        ndm_i_slots_take_over(&region->slots, &region->data);
    }
    free(values);
    return status;
}
