#include "store/handles.h"

#include "region/ledger.h"
#include "os/status.h"

#include <stdlib.h>

enum {
    FIRST_CHUNK = 64, /* entries; each further chunk has twice as many */
    CHUNKS = 24,
    FLAG_BITS = 3,
    LIVE = 1,
    BUSY = 2,
    DOOMED = 4,
    LAST_GENERATION = INT32_MAX /* an entry that got there is not used again; and handles stay below 2^63 */
};

struct entry {
    _Atomic uint64_t state;
    _Atomic(ndm_region *) region;
    _Atomic uint64_t thread, process; /* the region's owner */
    _Atomic uint32_t next;            /* in the list of unused entries: number of the next one, 0 at the end */
};

static _Atomic(struct entry *) chunks[CHUNKS];
static _Atomic uint32_t entered; /* entries that were ever used */
static _Atomic uint64_t unused;  /* head of the list: number of the entry, and above it a count of changes */

/* ---- the table ------------------------------------------------------------------------------------------ */

/* Entry `number`, from 1 on. NULL: there is none, or, if `grow`, no memory for it. */
static struct entry *entry_at(uint32_t number, bool grow)
{
    if (number == 0)
        return NULL;
    const uint64_t index = number - 1;
    const unsigned chunk = 63u - (unsigned)__builtin_clzll(index / FIRST_CHUNK + 1);
    if (chunk >= CHUNKS)
        return NULL;
    struct entry *entries = atomic_load_explicit(&chunks[chunk], memory_order_acquire);
    if (!entries && grow) {
        struct entry *fresh = calloc((size_t)FIRST_CHUNK << chunk, sizeof *fresh);
        if (!fresh)
            return NULL;
        if (atomic_compare_exchange_strong(&chunks[chunk], &entries, fresh))
            entries = fresh;
        else
            free(fresh); /* another thread was first; `entries` is its chunk */
    }
    return entries ? &entries[index - FIRST_CHUNK * (((uint64_t)1 << chunk) - 1)] : NULL;
}

/* Number of an entry for a new region, 0 if there is no memory. */
static uint32_t entry_take(void)
{
    uint64_t head = atomic_load(&unused);
    while ((uint32_t)head != 0) {
        const uint32_t next = atomic_load(&entry_at((uint32_t)head, false)->next);
        if (atomic_compare_exchange_weak(&unused, &head, ((head >> 32) + 1) << 32 | next))
            return (uint32_t)head;
    }
    uint32_t count = atomic_load(&entered);
    do {
        if (!entry_at(count + 1, true))
            return 0;
    } while (!atomic_compare_exchange_weak(&entered, &count, count + 1));
    return count + 1;
}

static void entry_give(uint32_t number, struct entry *entry)
{
    uint64_t head = atomic_load(&unused);
    do
        atomic_store(&entry->next, (uint32_t)head);
    while (!atomic_compare_exchange_weak(&unused, &head, ((head >> 32) + 1) << 32 | number));
}

/* The state that an entry has while `handle` is good and no call is running on it. */
static uint64_t idle_state(uint64_t handle) { return handle >> 32 << FLAG_BITS | LIVE; }

/* ---- a region's handle ---------------------------------------------------------------------------------- */

uint64_t ndm_region_handle(ndm_region *region)
{
    if (ndm_i_enter(region) != NDM_OK)
        return 0;
    uint64_t handle = atomic_load(&region->handle);
    if (handle != 0)
        return handle;
    const uint32_t number = entry_take();
    if (number == 0) {
        ndm_i_fail(NDM_ERR_MEMORY, "no memory for a handle");
        return 0;
    }
    struct entry *entry = entry_at(number, false);
    const uint64_t generation = (atomic_load(&entry->state) >> FLAG_BITS) + 1;
    atomic_store(&entry->region, region);
    atomic_store(&entry->thread, atomic_load(&region->owner.thread));
    atomic_store(&entry->process, region->owner.process);
    handle = generation << 32 | number;
    atomic_store(&entry->state, idle_state(handle));
    atomic_store(&region->handle, handle);
    return handle;
}

bool ndm_i_handle_retire(ndm_region *region)
{
    const uint64_t handle = atomic_load(&region->handle);
    if (handle == 0)
        return true;
    struct entry *entry = entry_at((uint32_t)handle, false);
    const uint64_t idle = idle_state(handle);
    uint64_t state = idle;
    while (!atomic_compare_exchange_weak(&entry->state, &state, idle & ~(uint64_t)LIVE)) {
        if (state == (idle | BUSY) && atomic_compare_exchange_weak(&entry->state, &state, state | DOOMED))
            return false;
        state = idle;
    }
    atomic_store(&region->handle, 0);
    if (handle >> 32 < LAST_GENERATION)
        entry_give((uint32_t)handle, entry);
    return true;
}

/* ---- calls by handle ------------------------------------------------------------------------------------ */

struct call {
    ndm_region *region; /* it stays until call_end(), whoever destroys it */
    struct entry *entry;
    uint64_t idle;
};

/* Every call by handle begins here. Nothing of the region is touched before it is held. */
static int call_begin(uint64_t handle, struct call *call)
{
    struct entry *entry = entry_at((uint32_t)handle, false);
    const uint64_t idle = idle_state(handle);
    if (!entry || (atomic_load_explicit(&entry->state, memory_order_acquire) | BUSY) != (idle | BUSY))
        goto stale;
    if (atomic_load_explicit(&entry->thread, memory_order_relaxed) != ndm_i_this_thread ||
        !ndm_i_is_process(atomic_load_explicit(&entry->process, memory_order_relaxed)))
        return ndm_i_fail(NDM_ERR_WRONG_THREAD, "the region belongs to another thread or process");
    uint64_t state = idle;
    if (!atomic_compare_exchange_strong_explicit(&entry->state, &state, idle | BUSY, memory_order_acquire,
                                                 memory_order_relaxed))
        goto stale;
    call->region = atomic_load_explicit(&entry->region, memory_order_relaxed);
    call->entry = entry;
    call->idle = idle;
    return NDM_OK;

stale:
    return ndm_i_fail(NDM_ERR_CLOSED, "the handle's region is closed");
}

static void call_end(const struct call *call)
{
    uint64_t state = call->idle | BUSY;
    if (atomic_compare_exchange_strong_explicit(&call->entry->state, &state, call->idle, memory_order_release,
                                                memory_order_acquire))
        return;
    atomic_store(&call->entry->state, call->idle); /* it was doomed, and nobody else may touch it now */
    ndm_region_destroy(call->region);
}

ndm_region *ndm_h_region(uint64_t handle)
{
    struct call call;
    if (call_begin(handle, &call) != NDM_OK)
        return NULL;
    call_end(&call);
    return call.region;
}

int64_t ndm_h_write(uint64_t handle, const uint8_t *data, uint64_t size, int64_t engine)
{
    struct call call;
    const int status = call_begin(handle, &call);
    if (status != NDM_OK)
        return status;
    const int64_t slot = ndm_region_write(call.region, data, size, engine);
    call_end(&call);
    return slot;
}

int64_t ndm_h_read_into(uint64_t handle, int64_t slot, uint8_t *buffer, uint64_t capacity)
{
    struct call call;
    const int status = call_begin(handle, &call);
    if (status != NDM_OK)
        return status;
    const int64_t size = ndm_region_read_into(call.region, slot, buffer, capacity);
    call_end(&call);
    return ndm_i_of_slot(slot, size);
}

const uint8_t *ndm_h_pin(uint64_t handle, int64_t slot, uint64_t *size)
{
    struct call call;
    if (call_begin(handle, &call) != NDM_OK)
        return NULL;
    const uint8_t *data = ndm_region_pin(call.region, slot, size);
    if (!data)
        ndm_i_of_slot(slot, ndm_last_error()->status);
    call_end(&call);
    return data;
}

int ndm_h_free(uint64_t handle, int64_t slot)
{
    struct call call;
    int status = call_begin(handle, &call);
    if (status != NDM_OK)
        return status;
    status = ndm_region_free(call.region, slot);
    call_end(&call);
    return (int)ndm_i_of_slot(slot, status);
}

int ndm_h_contains(uint64_t handle, int64_t slot)
{
    struct call call;
    int status = call_begin(handle, &call);
    if (status != NDM_OK)
        return status;
    status = ndm_region_contains(call.region, slot);
    call_end(&call);
    return status;
}

int64_t ndm_h_size(uint64_t handle, int64_t slot)
{
    struct call call;
    const int status = call_begin(handle, &call);
    if (status != NDM_OK)
        return status;
    const ndm_i_record *record = ndm_i_enter(call.region) == NDM_OK ? ndm_i_live_record(call.region, slot) : NULL;
    const int64_t size = record ? (int64_t)ndm_i_record_size(record) : ndm_last_error()->status;
    call_end(&call);
    return ndm_i_of_slot(slot, size);
}

/* ---- pins ----------------------------------------------------------------------------------------------- */

const uint8_t *ndm_region_pin(ndm_region *region, int64_t slot, uint64_t *size)
{
    uint64_t ignored;
    return (const uint8_t *)ndm_region_read(region, slot, size ? size : &ignored);
}

void ndm_region_unpin(const uint8_t *data) { ndm_view_release((const char *)data); }
