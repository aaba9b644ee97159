/* See room.h. */
#include "region/room.h"

#include "os/status.h"
#include "region/move.h"

#include <errno.h>

/* What is wanted: so many bytes of whole units, and the end that they may reach. */
typedef struct {
    uint64_t units, bytes, limit;
} request;

/* Neighbouring extents that may be moved together. `free` and `live` are in units. */
typedef struct {
    uint32_t first, last;
    uint64_t free, live;
} run;

/* A run that costs no more than so many times what is wanted is as good as the best. */
enum { CHEAP = 8 };

static request request_of(const ndm_region *region, const ndm_i_room *rooms, uint64_t count, uint64_t limit)
{
    request wanted = {.limit = limit};
    for (uint64_t i = 0; i < count; i++) {
        if (rooms[i].size == 0)
            continue;
        if (rooms[i].size >= NDM_I_SIZE_LIMIT / 2 || wanted.bytes >= NDM_I_SIZE_LIMIT / 2)
            return (request){0};
        wanted.bytes = ndm_i_bytes(region, wanted.units) + rooms[i].size; /* the last one may end within a unit */
        wanted.units += ndm_i_units(region, rooms[i].size);
    }
    return wanted;
}

/* Would a run hold what is wanted, once its values are moved together? The last extent's free space reaches to the limit. */
static bool holds(const ndm_region *region, const run *at, const request *wanted)
{
    const ndm_i_extents *extents = &region->extents;
    if (at->free >= wanted->units)
        return true;
    const uint64_t start = at->first == NDM_I_NONE ? extents->mark : ndm_i_extents_offset(extents, at->first) + at->live;
    return at->last == ndm_i_extents_last(extents) && ndm_i_bytes(region, start) + wanted->bytes <= wanted->limit;
}

/* Leave out of a run's start what it can do without. */
static void shorten(const ndm_region *region, run *at, const request *wanted)
{
    const ndm_i_extents *extents = &region->extents;
    while (at->first != at->last) {
        run less = *at;
        const uint64_t length = ndm_i_extents_length(extents, at->first);
        *(ndm_i_extents_is_free(extents, at->first) ? &less.free : &less.live) -= length;
        less.first = ndm_i_extents_next(extents, at->first);
        if (ndm_i_extents_is_free(extents, at->first) && !holds(region, &less, wanted))
            return;
        *at = less;
    }
}

/* Add an extent to a run; one that must stay begins a new run behind it. */
static void extend(ndm_region *region, run *at, uint32_t extent)
{
    const ndm_i_extents *extents = &region->extents;
    const uint64_t length = ndm_i_extents_length(extents, extent);
    at->last = extent;
    if (ndm_i_extents_is_free(extents, extent)) {
        at->first = at->first == NDM_I_NONE ? extent : at->first;
        at->free += length;
    } else if (at->first != NDM_I_NONE) { /* nothing moves in front of the first hole */
        const uint64_t size = ndm_i_movable(region, extent, UINT64_MAX);
        if (size > 0 && ndm_i_may_slide(region, size, ndm_i_bytes(region, at->free)))
            at->live += length;
        else
            *at = (run){.first = NDM_I_NONE, .last = extent};
    }
}

/* The run that holds what is wanted and has the fewest bytes to move, or nearly. false: there is none. */
static bool find_run(ndm_region *region, const request *wanted, run *best)
{
    const ndm_i_extents *extents = &region->extents;
    run at = {.first = NDM_I_NONE, .last = NDM_I_NONE};
    bool found = false;
    for (uint32_t e = ndm_i_extents_first_hole(&region->extents); e != NDM_I_NONE; e = ndm_i_extents_next(extents, e)) {
        extend(region, &at, e);
        if (at.first == NDM_I_NONE || !holds(region, &at, wanted))
            continue;
        shorten(region, &at, wanted);
        if (!found || at.live < best->live)
            *best = at;
        found = true;
        if (best->live <= CHEAP * wanted->units)
            break;
    }
    return found;
}

/* Move values together until there is room for what is wanted. false: there cannot be, or a move was refused. */
static bool gather(ndm_region *region, const request *wanted)
{
    enum { TRIES = 4 }; /* a reader may lease a value meanwhile */
    const ndm_i_extents *extents = &region->extents;
    ndm_i_settle(region);
    ndm_i_leases_look_round(&region->leases);
    const uint64_t mark = ndm_i_bytes(region, extents->mark);
    run best;
    if (wanted->units == 0 ||
        (extents->free_units < wanted->units &&
         ndm_i_bytes(region, extents->free_units) + (wanted->limit > mark ? wanted->limit - mark : 0) < wanted->bytes))
        return false;
    int status = NDM_OK;
    for (int tries = 0; tries < TRIES && find_run(region, wanted, &best); tries++) {
        uint32_t hole = best.first;
        uint64_t size;
        region->store.asked = 0;
        for (;;) {
            const run made = {hole, hole, ndm_i_extents_length(extents, hole), 0};
            if (holds(region, &made, wanted))
                return true;
            const uint32_t next = ndm_i_extents_next(extents, hole);
            if (next == NDM_I_NONE || (size = ndm_i_movable(region, next, UINT64_MAX)) == 0)
                break;
            if ((status = ndm_i_slide(region, &hole, size)) != NDM_OK)
                break;
            region->moved_bytes += size;
        }
        if (status != NDM_OK && status != NDM_ERR_STALE)
            break;
    }
    return false;
}

static bool disk_is_full(int status)
{
    const int code = ndm_last_error()->os_errno;
    return status == NDM_ERR_IO && (code == ENOSPC || code == EDQUOT || code == EFBIG);
}

/* The slot table had no room to grow. true: there may be some now. */
static bool give_back_blocks(ndm_region *region)
{
    const uint64_t end = ndm_i_taken_end(region), blocks = region->store.allocated;
    if (blocks <= end || ndm_last_error()->file != NDM_FILE_SLOTS)
        return false;
    ndm_i_store_punch(&region->store, end, region->data.capacity - end, ndm_i_pins_writable(&region->home));
    region->store.allocated = end;
    return region->data.can_punch;
}

int ndm_i_room_make(ndm_region *region, ndm_i_room *rooms, uint64_t count, ndm_i_before *before, int status)
{
    if (disk_is_full(status) && give_back_blocks(region) &&
        (status = ndm_i_take(region, rooms, count, before)) == NDM_OK)
        return status;
    if ((status != NDM_ERR_CAPACITY && !disk_is_full(status)) || ndm_last_error()->file == NDM_FILE_SLOTS)
        return status;
    const uint64_t limit = status == NDM_ERR_CAPACITY ? ndm_i_ceiling(region->max_capacity) : region->data.capacity;
    const request wanted = request_of(region, rooms, count, limit);
    const ndm_error refused = *ndm_last_error();
    return gather(region, &wanted) ? ndm_i_take(region, rooms, count, before) : ndm_i_fail_again(refused);
}

bool ndm_i_room_other(ndm_region *region, ndm_i_room *rooms, uint64_t count, ndm_i_before *before, int status)
{
    region->gate.lets = false; /* values move */
    if (!disk_is_full(status))
        return false;
    const request wanted = request_of(region, rooms, count, 0);
    if (wanted.units == 0)
        return false;
    ndm_i_undo(region, rooms, count, *before);
    for (uint64_t i = 0; i < count; i++)
        rooms[i].extent = NDM_I_NONE; /* what has gone back goes back once */
    const ndm_error refused = *ndm_last_error();
    if (gather(region, &wanted) && ndm_i_take(region, rooms, count, before) == NDM_OK)
        return true;
    ndm_i_fail_again(refused);
    return false;
}
