/* The region as its verbs see it: what ties slots, extents, views and grains together.
 *
 *   region.c  open, close, figures, the checker       values.c  one value: write, read, free, ...
 *   batch.c   many values in one call                 space.c   trim, compact, evict
 *   leased.c  freed values that are still in use      recover.c what an earlier owner left
 */
#ifndef NDM_REGION_H
#define NDM_REGION_H

#include "os/file.h"
#include "store/extents.h"
#include "store/grains.h"
#include "store/leases.h"
#include "nodedb_mem.h"
#include "os/owner.h"
#include "store/slots.h"
#include "store/pins.h"

struct ndm_region {
    ndm_i_owner owner;    /* .thread is 0 once closed: no thread has that number */
    ndm_i_extents extents;
    ndm_i_slots slots;
    ndm_i_backing data;
    ndm_i_grains grains;
    ndm_i_home home;
    ndm_i_leases leases;
    char *leases_path;     /* NULL for a temporary region */
    struct ndm_i_leased *leased; /* freed extents that leases keep */
    uint64_t initial_capacity; /* trim() shrinks the file no further */
    uint64_t max_capacity;
    uint64_t used_bytes;
    uint64_t live_bytes;
    uint64_t pinned_bytes; /* in extents that are freed and wait for a view or a lease */
    uint64_t growths;
    uint64_t moved_bytes;  /* by compact() */
    uint64_t engine_bytes[256]; /* live, by engine */
    uint64_t engine_slots[256];
    uint64_t forget_from;  /* pages of values of this size and more leave the RSS with the last view; UINT64_MAX where
                              RAM is not limited */
    unsigned unit_shift;   /* one unit of the extents is 1 << unit_shift bytes: the alignment */
    _Atomic uint64_t handle; /* see handle.h; 0 until someone asks for it, and after closing */
    _Atomic unsigned holders; /* of this struct: the handle, and the file until it is closed */
};

/* Every verb begins here: is it the owner's call? Freed extents whose views have ended come home on the way. */
int ndm_i_enter(ndm_region *region);

/* The same, but without looking after a write-back that failed: that is left for a call that can wait, and tell. */
int ndm_i_enter_to_look(ndm_region *region);

/* The record of a live slot; NULL, with the error set, if there is none. */
ndm_i_record *ndm_i_live_record(const ndm_region *region, int64_t slot);

/* Where a value is going to be, and what to undo if it cannot. */
typedef struct {
    ndm_i_place place;
    uint64_t offset, size;
    uint64_t vacant;   /* end of the bytes from `offset` on that hold no value */
    uint64_t capacity; /* of the file before */
} ndm_i_spot;

/* Find room for `size` bytes, 1 or more, and make the file reach there. Nothing else changes. */
int ndm_i_spot_find(ndm_region *region, uint64_t size, ndm_i_spot *spot);

/* The bytes could not be stored: the file shrinks to what it was. */
void ndm_i_spot_leave(ndm_region *region, const ndm_i_spot *spot);

/* Make the file reach `end`. */
int ndm_i_reach(ndm_region *region, uint64_t end);

/* End of the bytes from `place` on that hold no value. */
uint64_t ndm_i_vacant(const ndm_region *region, ndm_i_place place);

/* Tell readers the figures that they may see. */
void ndm_i_publish(ndm_region *region);

/* A freed extent that something keeps; that nothing keeps any more. */
void ndm_i_orphan_leaves(ndm_region *region, uint32_t extent);
void ndm_i_orphan_returns(ndm_region *region, uint32_t extent);

/* Note that leases of that value keep the freed extent; NDM_I_NO_SLOT: any lease of its bytes. false: no memory. */
bool ndm_i_leased_keep(ndm_region *region, uint32_t extent, uint32_t slot, uint32_t generation);

/* Let freed extents come home whose leases have ended: those released, and if `reap` those of dead processes. */
void ndm_i_leased_collect(ndm_region *region, bool reap);

/* Forget the extents that leases keep: the region is closing. */
void ndm_i_leased_forget(ndm_region *region);

/* Take over the values of a table that was adopted, and what leases keep. NDM_ERR_IO with EUCLEAN if it is torn. */
int ndm_i_recover(ndm_region *region);

/* Join the leases file that is there: readers may lease through it from now on, whether anything is shared or not. A
 * status if there may be one that the system does not let us use: what it keeps would be overwritten. */
int ndm_i_join_leases(ndm_region *region);

/* The places that living readers of an earlier opening lease, in whole units within the file, in order and apart. Room
 * for NDM_I_LEASES. */
uint64_t ndm_i_leased_before(ndm_region *region, ndm_i_span *places);

/* Take extents for these places, in an empty region. */
int ndm_i_keep_places(ndm_region *region, const ndm_i_span *places, uint64_t count);

/* Count a value among the figures. */
void ndm_i_count_value(ndm_region *region, uint64_t offset, uint64_t size, uint8_t engine);

/* Enter a value whose bytes are in place and whose extent is taken. Needs a reserved slot. */
uint32_t ndm_i_enter_value(ndm_region *region, uint64_t offset, uint64_t size, uint32_t extent, uint8_t engine,
                           uint8_t state);

/* Take a live value out of the books; its extent is reusable, or an orphan. */
void ndm_i_remove_value(ndm_region *region, uint32_t slot);

/* Add a view of a live value. NULL, with the error set, if there is no memory. */
const char *ndm_i_view_value(ndm_region *region, const ndm_i_record *record);

/* Are the slots all live, and none named twice if `once`? */
int ndm_i_check_slots(ndm_region *region, const int64_t *slots, uint64_t count, bool once);

int ndm_i_check_engine(int64_t engine);

/* Slot records hold no offset past 2^47, and no process has more address space. */
static inline uint64_t ndm_i_ceiling(uint64_t max_capacity)
{
    return max_capacity < NDM_I_SIZE_LIMIT / 2 ? max_capacity : NDM_I_SIZE_LIMIT / 2;
}

static inline uint64_t ndm_i_units(const ndm_region *region, uint64_t bytes)
{
    return (bytes + ((uint64_t)1 << region->unit_shift) - 1) >> region->unit_shift;
}

#endif
