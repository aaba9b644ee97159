/* See ledger.h. */
#include "region/ledger.h"

#include "os/bytes.h"
#include "os/status.h"
#include "region/place.h"

#include <assert.h>
#include <errno.h>

/* ---- entering a verb ------------------------------------------------------------------------------------ */

/* The region has no owner, or another. */
static __attribute__((noinline)) int enter_shared(ndm_region *region, bool at_once)
{
    const uint64_t holder = ndm_i_owner_holder(&region->owner);
    if (holder == NDM_I_SHARED && ndm_i_is_process(region->owner.process)) {
        if (at_once && !ndm_i_gate_trylock(&region->gate))
            return NDM_ERR_WAIT;
        if (!at_once)
            ndm_i_gate_lock(&region->gate);
        if (!ndm_i_owner_is_closed(&region->owner))
            return NDM_OK;
        ndm_i_gate_unlock(&region->gate); /* closed meanwhile */
    } else if (holder != NDM_I_CLOSED) {
        return ndm_i_fail(NDM_ERR_WRONG_THREAD, "the region belongs to another thread or process");
    }
    return ndm_i_fail(NDM_ERR_CLOSED, "the region is closed");
}

static inline __attribute__((always_inline)) int enter(ndm_region *region, bool at_once)
{
    if (!region)
        return ndm_i_fail(NDM_ERR_CLOSED, "the region is closed");
    if (ndm_i_owner_holder(&region->owner) != ndm_i_this_thread || !ndm_i_is_process(region->owner.process)) {
        const int status = enter_shared(region, at_once);
        if (status != NDM_OK)
            return status;
    }
    if (ndm_i_limbo_collect(&region->limbo))
        ndm_i_publish(region);
    return NDM_OK;
}

int ndm_i_enter_to_look(ndm_region *region) { return enter(region, false); }

int ndm_i_enter_at_once(ndm_region *region) { return enter(region, true); }

int ndm_i_check_written(ndm_region *region)
{
    if (!ndm_i_store_has_failed(&region->store))
        return NDM_OK;
    ndm_i_writer_settle_ahead(&region->store.writer, 0, 0);
    const int failed = ndm_i_writer_settle(&region->store.writer, 0, region->data.capacity, false);
    return failed ? ndm_i_fail_io(failed, "writing spilled values back to disk failed") : NDM_OK;
}

/* On failure the verb has not entered. */
static __attribute__((noinline, cold)) int enter_failed(ndm_region *region)
{
    const int status = ndm_i_check_written(region);
    if (status != NDM_OK)
        ndm_i_leave(&region);
    return status;
}

int ndm_i_enter(ndm_region *region)
{
    const int status = enter(region, false);
    return status == NDM_OK && ndm_i_store_has_failed(&region->store) ? enter_failed(region) : status;
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

int ndm_i_check_engine(int64_t engine)
{
    return engine >= 0 && engine <= 255 ? NDM_OK : ndm_i_fail(NDM_ERR_ARGUMENT, "engine must be 0 to 255");
}

void ndm_i_publish(ndm_region *region)
{
    ndm_i_header *header = ndm_i_slots_header(&region->slots);
    atomic_store_explicit(&header->capacity, region->data.capacity, memory_order_relaxed);
    atomic_store_explicit(&header->max_capacity, region->max_capacity, memory_order_relaxed);
    atomic_store_explicit(&header->used_bytes, region->used_bytes, memory_order_relaxed);
    atomic_store_explicit(&header->live_bytes, region->live_bytes, memory_order_relaxed);
    atomic_store_explicit(&header->pinned_bytes, ndm_i_bytes(region, region->limbo.units + region->limbo.waiting_units),
                          memory_order_relaxed);
}

void ndm_i_settle(ndm_region *region)
{
    ndm_i_limbo_settle(&region->limbo);
    ndm_i_publish(region);
}

/* ---- room ----------------------------------------------------------------------------------------------- */

uint64_t ndm_i_free_bytes(const ndm_region *region, uint64_t *largest)
{
    /* A hole at the end reaches to the mark, a whole number of units; used_bytes is exact. What threads that failed have given
     * back may lie above it as a whole, while others write below. */
    const ndm_i_extents *extents = &region->extents;
    const uint32_t last = ndm_i_extents_last(extents);
    uint64_t free_bytes = ndm_i_bytes(region, extents->free_units);
    if (last != NDM_I_NONE && ndm_i_extents_is_free(extents, last))
        free_bytes -= ndm_i_min(ndm_i_bytes(region, ndm_i_extents_length(extents, last)),
                                ndm_i_bytes(region, extents->mark) - region->used_bytes);
    *largest = ndm_i_min(ndm_i_bytes(region, ndm_i_extents_largest(extents)), free_bytes);
    return free_bytes;
}

int ndm_i_explained(ndm_region *region, int status)
{
    const int code = ndm_last_error()->os_errno;
    const bool disk_is_full = status == NDM_ERR_IO && (code == ENOSPC || code == EDQUOT);
    if (status != NDM_ERR_CAPACITY && !disk_is_full)
        return status;
    if (ndm_i_limbo_is_unsettled(&region->limbo))
        ndm_i_settle(region);
    ndm_error space = {.disk_free = ndm_i_file_disk_free(&region->data)};
    space.free_bytes = ndm_i_free_bytes(region, &space.largest_free_bytes);
    space.pinned_bytes = ndm_i_bytes(region, region->limbo.units);
    if (region->limbo.units > 0) /* else there is nothing to count */
        space.views = (int32_t)ndm_i_min(ndm_i_pins_orphan_views(&region->home), INT32_MAX);
    ndm_i_of_space(space);
    return status;
}

/* Make the file reach `end`: twice its capacity, or what is needed if the ceiling or the disk allows no more. */
static int reach(ndm_region *region, uint64_t end)
{
    if (end <= region->data.capacity)
        return NDM_OK;
    const uint64_t ceiling = ndm_i_ceiling(region->max_capacity);
    if (end > ceiling)
        return ndm_i_fail_capacity(end, ceiling);
    const uint64_t wanted = ndm_i_min(ndm_i_max(region->data.capacity * 2, end), ceiling);
    return ndm_i_store_grow(&region->store, end, wanted, ceiling);
}

/* End of the bytes from `place` on that hold no value. */
static inline __attribute__((always_inline)) uint64_t vacant(const ndm_region *region, ndm_i_place place)
{
    const ndm_i_extents *extents = &region->extents;
    if (place.hole == NDM_I_NONE || place.hole == ndm_i_extents_last(extents))
        return UINT64_MAX;
    return ndm_i_bytes(region, place.offset + ndm_i_extents_length(extents, place.hole));
}

uint64_t ndm_i_taken_end(const ndm_region *region)
{
    const uint64_t mark = region->gate.outside > 0 ? ndm_i_bytes(region, region->extents.mark) : 0;
    return ndm_i_max(region->used_bytes, ndm_i_min(mark, region->data.capacity));
}

uint64_t ndm_i_still_vacant(const ndm_region *region, const ndm_i_room *room)
{
    const ndm_i_extents *extents = &region->extents;
    const uint32_t next = ndm_i_extents_next(extents, room->extent);
    if (next == NDM_I_NONE)
        return UINT64_MAX;
    const ndm_i_place place = {.offset = ndm_i_extents_offset(extents, next),
                               .hole = ndm_i_extents_is_free(extents, next) ? next : NDM_I_NONE};
    return place.hole == NDM_I_NONE ? ndm_i_bytes(region, place.offset) : vacant(region, place);
}

/* Take an extent for each value. Gives how many have been dealt with, and where the furthest ends. */
static int take_extents(ndm_region *region, ndm_i_room *rooms, uint64_t count, uint64_t *taken, uint64_t *furthest)
{
    ndm_i_extents *extents = &region->extents;
    *furthest = 0;
    for (*taken = 0; *taken < count; ++*taken) {
        ndm_i_room *room = &rooms[*taken];
        const uint64_t size = room->size, units = ndm_i_units(region, size);
        *room = (ndm_i_room){.size = size, .extent = NDM_I_NONE};
        if (size == 0)
            continue;
        if (size >= NDM_I_SIZE_LIMIT / 2 || *furthest >= NDM_I_SIZE_LIMIT / 2)
            return ndm_i_fail_capacity(size, ndm_i_ceiling(region->max_capacity));
        if (!ndm_i_extents_reserve(extents))
            return ndm_i_fail(NDM_ERR_MEMORY, "no memory for an extent");
        const ndm_i_place place = ndm_i_place_find(region, units);
        room->offset = ndm_i_bytes(region, place.offset);
        room->vacant = vacant(region, place);
        room->extent = ndm_i_extents_take(extents, place, units, NDM_I_NONE);
        *furthest = ndm_i_max(*furthest, room->offset + size);
    }
    return NDM_OK;
}

void ndm_i_undo(ndm_region *region, const ndm_i_room *rooms, uint64_t count, ndm_i_before before)
{
    for (uint64_t i = 0; i < count; i++)
        if (rooms[i].extent != NDM_I_NONE)
            ndm_i_extents_release(&region->extents, rooms[i].extent);
    /* Others who were let in may have taken what follows. */
    const ndm_i_extents *extents = &region->extents;
    const uint32_t last = ndm_i_extents_last(extents);
    const uint64_t end = last == NDM_I_NONE                      ? 0
                         : ndm_i_extents_is_free(extents, last) ? ndm_i_extents_offset(extents, last)
                                                                 : extents->mark;
    ndm_i_extents_lower(&region->extents, ndm_i_max(ndm_i_max(before.mark, end), ndm_i_units(region, region->used_bytes)));
    if (region->data.capacity <= before.capacity)
        return;
    /* And readers may still look at what was theirs. */
    const bool shared = region->gate.shared, stands = ndm_i_bytes(region, extents->mark) > before.capacity;
    if (shared && (stands || !ndm_i_slots_bar_readers(&region->slots)))
        return;
    ndm_i_store_shrink(&region->store, before.capacity);
    if (shared)
        ndm_i_slots_let_readers(&region->slots);
}

int ndm_i_take(ndm_region *region, ndm_i_room *rooms, uint64_t count, ndm_i_before *before)
{
    uint64_t taken = 0, furthest;
    int status = ndm_i_slots_reserve(&region->slots, count);
    if (status != NDM_OK)
        return ndm_i_explained(region, status);
    *before = (ndm_i_before){.mark = region->extents.mark, .capacity = region->data.capacity};
    status = take_extents(region, rooms, count, &taken, &furthest);
    if (status == NDM_OK && furthest > region->data.capacity && ndm_i_limbo_is_unsettled(&region->limbo)) {
        /* Growing is when space is short: what nobody leases comes home, once. */
        ndm_i_undo(region, rooms, taken, *before);
        ndm_i_settle(region);
        before->mark = region->extents.mark;
        status = take_extents(region, rooms, count, &taken, &furthest);
    }
    if (status == NDM_OK)
        status = reach(region, furthest);
    if (region->gate.shared && region->data.capacity == before->capacity)
        before->capacity = UINT64_MAX;
    if (status != NDM_OK)
        ndm_i_undo(region, rooms, taken, *before);
    return status == NDM_OK ? NDM_OK : ndm_i_explained(region, status);
}

/* ---- values --------------------------------------------------------------------------------------------- */

/* Count a value among the figures. */
static void count_value(ndm_region *region, uint64_t offset, uint64_t size, uint8_t engine)
{
    region->live_bytes += size;
    region->engine_bytes[engine] += size;
    region->engine_slots[engine]++;
    region->used_bytes = ndm_i_max(region->used_bytes, offset + size);
    ndm_i_grains_count_large(&region->store.grains, offset, size, 1);
}

void ndm_i_enter_values(ndm_region *region, const ndm_i_room *rooms, uint64_t count, ndm_i_before before, uint8_t engine,
                        uint8_t state, int64_t *slots)
{
    region->growths += region->data.capacity > before.capacity;
    for (uint64_t i = 0; i < count; i++) {
        const ndm_i_room *room = &rooms[i];
        const uint32_t slot = ndm_i_slots_add(&region->slots, room->offset, room->size, engine, room->extent, state);
        if (room->extent != NDM_I_NONE)
            ndm_i_extents_set_tag(&region->extents, room->extent, slot);
        count_value(region, room->offset, room->size, engine);
        slots[i] = slot;
    }
    ndm_i_publish(region);
}

void ndm_i_remove_value(ndm_region *region, uint32_t slot)
{
    const ndm_i_record *record = ndm_i_slots_record(&region->slots, slot);
    const uint32_t extent = ndm_i_record_link(record), generation = ndm_i_record_generation(record);
    const uint64_t size = ndm_i_record_size(record);
    const uint8_t engine = ndm_i_record_engine(record);
    assert(region->live_bytes >= size && region->engine_slots[engine] > 0);
    region->live_bytes -= size;
    region->engine_bytes[engine] -= size;
    region->engine_slots[engine]--;
    ndm_i_grains_count_large(&region->store.grains, ndm_i_record_offset(record), size, -1);
    ndm_i_slots_remove(&region->slots, slot); /* before anybody asks whether it is leased: see leases.h */
    if (extent != NDM_I_NONE)
        ndm_i_limbo_add(&region->limbo, extent, slot, generation);
    ndm_i_publish(region);
}

int ndm_i_pin(ndm_region *region, uint32_t extent, ndm_i_mapping *mapping, const void *address, uint64_t size,
              bool writable)
{
    /* A private mapping goes with its view: nothing is left to be forgotten. */
    bool wide = false;
    const bool forgets =
        mapping == region->data.mapping &&
        ndm_i_store_forgets(&region->store, (uint64_t)((const uint8_t *)address - mapping->base), size, &wide);
    return ndm_i_pins_add(&region->home, extent, mapping, address, forgets ? size : 0, wide, writable)
               ? NDM_OK
               : ndm_i_fail(NDM_ERR_MEMORY, "no memory for a view");
}

/* Before the record is changed. */
static void note_move(ndm_region *region, uint32_t slot, uint64_t to)
{
    const ndm_i_record *record = ndm_i_slots_record(&region->slots, slot);
    const uint64_t size = ndm_i_record_size(record);
    ndm_i_grains_count_large(&region->store.grains, ndm_i_record_offset(record), size, -1);
    ndm_i_grains_count_large(&region->store.grains, to, size, 1);
}

void ndm_i_value_moved(ndm_region *region, uint32_t extent, ndm_i_place place)
{
    ndm_i_extents *extents = &region->extents;
    const uint32_t slot = ndm_i_extents_tag(extents, extent);
    note_move(region, slot, ndm_i_bytes(region, place.offset));
    const uint32_t fresh = ndm_i_extents_take(extents, place, ndm_i_extents_length(extents, extent), slot);
    ndm_i_slots_move_end(&region->slots, slot, ndm_i_bytes(region, place.offset), fresh);
    ndm_i_extents_release(extents, extent);
}

uint32_t ndm_i_value_slid(ndm_region *region, uint32_t hole)
{
    ndm_i_extents *extents = &region->extents;
    const uint32_t extent = ndm_i_extents_next(extents, hole), slot = ndm_i_extents_tag(extents, extent);
    const uint64_t to = ndm_i_bytes(region, ndm_i_extents_offset(extents, hole));
    note_move(region, slot, to);
    const uint32_t behind = ndm_i_extents_slide(extents, hole);
    ndm_i_slots_move_end(&region->slots, slot, to, extent);
    return behind;
}

/* ---- recovery ------------------------------------------------------------------------------------------- */

/* Take `units` at `start`, which is the mark or after it; the gap before becomes free. NDM_I_NONE: no memory. */
static uint32_t take_at(ndm_i_extents *extents, uint64_t start, uint64_t units)
{
    uint32_t gap = NDM_I_NONE;
    assert(start >= extents->mark);
    if (start > extents->mark) {
        if (!ndm_i_extents_reserve(extents))
            return NDM_I_NONE;
        const ndm_i_place before = {.offset = extents->mark, .hole = NDM_I_NONE};
        gap = ndm_i_extents_take(extents, before, start - extents->mark, NDM_I_NONE);
    }
    if (!ndm_i_extents_reserve(extents))
        return NDM_I_NONE;
    const ndm_i_place place = {.offset = start, .hole = NDM_I_NONE};
    const uint32_t extent = ndm_i_extents_take(extents, place, units, NDM_I_NONE);
    if (gap != NDM_I_NONE)
        ndm_i_extents_release(extents, gap);
    return extent;
}

int ndm_i_adopt(ndm_region *region, uint64_t offset, uint64_t size, uint32_t slot)
{
    uint32_t extent = NDM_I_NONE;
    if (size > 0) {
        extent = take_at(&region->extents, offset >> region->unit_shift, ndm_i_units(region, size));
        if (extent == NDM_I_NONE)
            return ndm_i_fail(NDM_ERR_MEMORY, "no memory for an extent");
        ndm_i_grains_adopt(&region->store.grains, offset, size);
    }
    if (slot == NDM_I_NO_SLOT) {
        region->used_bytes = ndm_i_min(ndm_i_max(region->used_bytes, offset + size), region->data.capacity);
        return ndm_i_limbo_add_leased(&region->limbo, extent)
                   ? NDM_OK
                   : ndm_i_fail(NDM_ERR_MEMORY, "no memory to note a leased extent");
    }
    if (extent != NDM_I_NONE)
        ndm_i_extents_set_tag(&region->extents, extent, slot);
    ndm_i_slots_set_extent(&region->slots, slot, extent);
    count_value(region, offset, size, ndm_i_record_engine(ndm_i_slots_record(&region->slots, slot)));
    return NDM_OK;
}
