/* The ledger: the region, and the one place that changes slot, extent and pin together.
 *
 * A value is entered in three steps: the ledger takes room, the caller has the store put the bytes there, the ledger
 * enters the value. Until the last step nothing but the room has been taken, and ndm_i_undo() gives that back; so a verb
 * that fails has changed nothing. A single write is a batch of one.
 *
 * Verbs (write.c, read.c, ...) call the ledger; the ledger calls the store's rooms; nothing here calls a verb. All
 * functions are the owner's; of a region that every thread may use, whoever has entered a verb is the owner until he leaves
 * it. While others are let in, he keeps what he has taken or pinned, and no record that he has looked at.
 */
#ifndef NDM_LEDGER_H
#define NDM_LEDGER_H

#include "nodedb_mem.h"
#include "os/bits.h"
#include "os/file.h"
#include "os/fork.h"
#include "os/gate.h"
#include "os/owner.h"
#include "region/limbo.h"
#include "store/extents.h"
#include "store/leases.h"
#include "store/pins.h"
#include "store/slots.h"
#include "store/store.h"

struct ndm_region {
    ndm_i_owner owner;
    ndm_i_gate gate;
    ndm_i_extents extents;
    ndm_i_slots slots;
    ndm_i_file data;
    ndm_i_store store;
    ndm_i_home home;
    ndm_i_leases leases;
    ndm_i_limbo limbo;
    char *leases_path;     /* NULL for a temporary region */
    uint64_t initial_capacity; /* trim() shrinks the file no further */
    uint64_t max_capacity;
    uint64_t used_bytes;
    uint64_t live_bytes;
    uint64_t growths;
    uint64_t moved_bytes;  /* by compact() */
    uint64_t trimmed_to;   /* where the next trim with a budget goes on; 0: at the start */
    uint64_t engine_bytes[256]; /* live, by engine */
    uint64_t engine_slots[256];
    unsigned unit_shift;   /* one unit of the extents is 1 << unit_shift bytes: the alignment */
    _Atomic uint64_t handle; /* see native.c; 0 until someone asks for it, and after closing */
    _Atomic unsigned holders; /* of this struct: the handle, and the file until it is closed */
    ndm_i_fork_entry at_fork;
    bool home_left;       /* the region no longer uses its home */
    bool left;            /* in a forked child: the region was let go of */
};

/* ---- entering a verb ---- */

/* Every verb begins here: is it the owner's call? Or may every thread call, once it has the lock? What has left limbo comes
 * home on the way. A verb that has entered begins with NDM_I_LEAVES. */
int ndm_i_enter(ndm_region *region);

/* The same, but without looking after a write-back that failed: that is left for a call that can wait, and report it. */
int ndm_i_enter_to_look(ndm_region *region);

/* The same, for a call that waits for nobody: NDM_ERR_WAIT if another thread has the lock. */
int ndm_i_enter_at_once(ndm_region *region);

/* Has a write-back failed in the background? Reports it. */
int ndm_i_check_written(ndm_region *region);

static inline void ndm_i_leave(ndm_region *const *region)
{
    if ((*region)->gate.shared)
        ndm_i_gate_unlock(&(*region)->gate);
}

/* The verb leaves the region when it returns, wherever that is. */
#define NDM_I_LEAVES(region) __attribute__((cleanup(ndm_i_leave), unused)) ndm_region *const entered = (region)

/* From here on others may come in while this verb waits for the disk: it has taken or pinned what it works on. */
static inline void ndm_i_let_others(ndm_region *region)
{
    if (region->gate.shared)
        region->gate.lets = true;
}

static inline bool ndm_i_region_is_closed(const ndm_region *region)
{
    return !region || ndm_i_owner_is_closed(&region->owner);
}

/* The record of a live slot; NULL, with the error set, if there is none. */
ndm_i_record *ndm_i_live_record(const ndm_region *region, int64_t slot);

int ndm_i_check_engine(int64_t engine);

/* Show readers the figures that they may see. */
void ndm_i_publish(ndm_region *region);

/* Bring home what nothing keeps: before space is gathered, and before figures are told. */
void ndm_i_settle(ndm_region *region);

/* ---- room ---- */

/* Room for one value. The caller fills in `size`; one of 0 bytes takes none. */
typedef struct {
    uint64_t size;
    uint64_t offset; /* of the value in the file */
    uint64_t vacant; /* end of the bytes from `offset` on that hold no value */
    uint32_t extent; /* NDM_I_NONE for an empty value */
} ndm_i_room;

/* The space as it was before it was taken. */
typedef struct {
    uint64_t mark;
    uint64_t capacity; /* of many threads UINT64_MAX if the file did not grow for it: if it has grown since, others needed that */
} ndm_i_before;

/* The end of what is taken, also by those who write now and have let others in. */
uint64_t ndm_i_taken_end(const ndm_region *region);

/* `vacant` of a room, as it is now: others who were let in may have taken what follows. */
uint64_t ndm_i_still_vacant(const ndm_region *region, const ndm_i_room *room);

static inline uint64_t ndm_i_vacant(const ndm_region *region, const ndm_i_room *room)
{
    return region->gate.shared ? ndm_i_still_vacant(region, room) : room->vacant;
}

/* Bytes below used_bytes that no value, view or lease has, and how many of them lie together at most. */
uint64_t ndm_i_free_bytes(const ndm_region *region, uint64_t *largest);

/* The status of a verb that gave back what it had taken. Where room was missing, the details of the error say what is free,
 * and what is pinned. */
int ndm_i_explained(ndm_region *region, int status);

/* Take room for `count` values, and make sure of their slots. Where the file would have to grow, limbo is settled first. On
 * failure nothing has been taken. */
int ndm_i_take(ndm_region *region, ndm_i_room *rooms, uint64_t count, ndm_i_before *before);

/* The bytes could not be stored: all goes back. */
void ndm_i_undo(ndm_region *region, const ndm_i_room *rooms, uint64_t count, ndm_i_before before);

/* Others come in no more. Where they did, they may have taken the slots that were made sure of, and others are needed. */
static inline int ndm_i_let_nobody(ndm_region *region, int status, uint64_t count)
{
    if (!region->gate.shared)
        return status;
    region->gate.lets = false;
    return status == NDM_OK ? ndm_i_slots_reserve(&region->slots, count) : status;
}

/* The bytes are in place: enter the values, LIVE or DRAFT. Cannot fail. Their numbers go to `slots`. */
void ndm_i_enter_values(ndm_region *region, const ndm_i_room *rooms, uint64_t count, ndm_i_before before, uint8_t engine,
                        uint8_t state, int64_t *slots);

/* ---- values ---- */

/* Take a live value out of the books; its extent is free, or in limbo. */
void ndm_i_remove_value(ndm_region *region, uint32_t slot);

/* Pin an extent by a view of `size` bytes at `address`, which lies in `mapping`. */
int ndm_i_pin(ndm_region *region, uint32_t extent, ndm_i_mapping *mapping, const void *address, uint64_t size,
              bool writable);

/* A value's bytes have moved: into the place that find() gave, or to the start of the hole before it. Needs a reserved
 * node for the first; the second gives the hole that follows it now. */
void ndm_i_value_moved(ndm_region *region, uint32_t extent, ndm_i_place place);
uint32_t ndm_i_value_slid(ndm_region *region, uint32_t hole);

/* ---- recovery: extents at given places, in the order of the file ---- */

/* Take the extent of [offset, offset + size), which begins at the mark or after it; what lies between becomes free. For
 * the value in that slot, whose figures are counted; or for leased bytes that no slot names (NDM_I_NO_SLOT). */
int ndm_i_adopt(ndm_region *region, uint64_t offset, uint64_t size, uint32_t slot);

/* ---- units ---- */

/* Slot records hold no offset past 2^47, and no process has more address space. */
static inline uint64_t ndm_i_ceiling(uint64_t max_capacity) { return ndm_i_min(max_capacity, NDM_I_SIZE_LIMIT / 2); }

static inline uint64_t ndm_i_units(const ndm_region *region, uint64_t bytes)
{
    return (bytes + ((uint64_t)1 << region->unit_shift) - 1) >> region->unit_shift;
}

static inline uint64_t ndm_i_bytes(const ndm_region *region, uint64_t units) { return units << region->unit_shift; }

#endif
