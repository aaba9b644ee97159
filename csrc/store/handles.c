/* See handles.h. */
#include "store/handles.h"

#include "os/owner.h"
#include "os/status.h"

#include <stdlib.h>

enum {
    FIRST_CHUNK = 64, /* entries; each further chunk has twice as many */
    CHUNKS = 24,
    FLAG_BITS = 2,
    LIVE = 1,
    DOOMED = 2,
    CALLS_SHIFT = 48,
    LAST_GENERATION = INT32_MAX /* an entry that got there is not used again; and handles stay below 2^63 */
};

#define ONE_CALL ((uint64_t)1 << CALLS_SHIFT)

struct ndm_i_handle_entry {
    _Atomic uint64_t state;
    _Atomic(void *) object;
    _Atomic uint64_t thread, process; /* the object's owner: a thread, or NDM_I_SHARED */
    _Atomic uint32_t next;            /* in the list of unused entries: number of the next one, 0 at the end */
};

static _Atomic(struct ndm_i_handle_entry *) chunks[CHUNKS];
static _Atomic uint32_t entered; /* entries that were ever used */
static _Atomic uint64_t unused;  /* head of the list: number of the entry, and above it a count of changes */

/* ---- the table ------------------------------------------------------------------------------------------ */

/* Entry `number`, from 1 on. NULL: there is none, or, if `grow`, no memory for it. */
static struct ndm_i_handle_entry *entry_at(uint32_t number, bool grow)
{
    if (number == 0)
        return NULL;
    const uint64_t index = number - 1;
    const unsigned chunk = 63u - (unsigned)__builtin_clzll(index / FIRST_CHUNK + 1);
    if (chunk >= CHUNKS)
        return NULL;
    struct ndm_i_handle_entry *entries = atomic_load_explicit(&chunks[chunk], memory_order_acquire);
    if (!entries && grow) {
        struct ndm_i_handle_entry *fresh = calloc((size_t)FIRST_CHUNK << chunk, sizeof *fresh);
        if (!fresh)
            return NULL;
        if (atomic_compare_exchange_strong(&chunks[chunk], &entries, fresh))
            entries = fresh;
        else
            free(fresh); /* another thread was first; `entries` is its chunk */
    }
    return entries ? &entries[index - FIRST_CHUNK * (((uint64_t)1 << chunk) - 1)] : NULL;
}

/* Number of an entry for a new handle, 0 if there is no memory. */
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

static void entry_give(uint32_t number, struct ndm_i_handle_entry *entry)
{
    uint64_t head = atomic_load(&unused);
    do
        atomic_store(&entry->next, (uint32_t)head);
    while (!atomic_compare_exchange_weak(&unused, &head, ((head >> 32) + 1) << 32 | number));
}

/* The state that an entry has while `handle` is good and no call is running on it. */
static uint64_t idle_state(uint64_t handle) { return handle >> 32 << FLAG_BITS | LIVE; }

static uint64_t calls_aside(uint64_t state) { return state & (ONE_CALL - 1); }

/* ---- handles -------------------------------------------------------------------------------------------- */

uint64_t ndm_i_handle_new(void *object, uint64_t thread, uint64_t process)
{
    const uint32_t number = entry_take();
    if (number == 0)
        return 0;
    struct ndm_i_handle_entry *entry = entry_at(number, false);
    const uint64_t generation = (atomic_load(&entry->state) >> FLAG_BITS) + 1;
    const uint64_t handle = generation << 32 | number;
    atomic_store(&entry->object, object);
    atomic_store(&entry->thread, thread);
    atomic_store(&entry->process, process);
    atomic_store(&entry->state, idle_state(handle));
    return handle;
}

void ndm_i_handle_pass(uint64_t handle, uint64_t thread)
{
    atomic_store(&entry_at((uint32_t)handle, false)->thread, thread);
}

bool ndm_i_handle_retire(uint64_t handle)
{
    struct ndm_i_handle_entry *entry = entry_at((uint32_t)handle, false);
    const uint64_t dead = idle_state(handle) & ~(uint64_t)LIVE;
    uint64_t state = atomic_load(&entry->state);
    while (!atomic_compare_exchange_weak(&entry->state, &state, state < ONE_CALL ? dead : state | DOOMED))
        ;
    if (state >= ONE_CALL)
        return false;
    if (handle >> 32 < LAST_GENERATION)
        entry_give((uint32_t)handle, entry);
    return true;
}

/* ---- calls ---------------------------------------------------------------------------------------------- */

int ndm_i_call_begin(uint64_t handle, ndm_i_call *call)
{
    struct ndm_i_handle_entry *entry = entry_at((uint32_t)handle, false);
    const uint64_t idle = idle_state(handle);
    uint64_t state = entry ? atomic_load_explicit(&entry->state, memory_order_acquire) : 0;
    if (calls_aside(state) != idle)
        goto stale;
    const uint64_t thread = atomic_load_explicit(&entry->thread, memory_order_relaxed);
    if ((thread != ndm_i_this_thread && thread != NDM_I_SHARED) ||
        !ndm_i_is_process(atomic_load_explicit(&entry->process, memory_order_relaxed)))
        return ndm_i_fail(NDM_ERR_WRONG_THREAD, "the region belongs to another thread or process");
    while (!atomic_compare_exchange_weak_explicit(&entry->state, &state, state + ONE_CALL, memory_order_acquire,
                                                  memory_order_relaxed))
        if (calls_aside(state) != idle)
            goto stale;
    call->object = atomic_load_explicit(&entry->object, memory_order_relaxed);
    call->entry = entry;
    call->idle = idle;
    return NDM_OK;

stale:
    return ndm_i_fail(NDM_ERR_CLOSED, "the handle's region is closed");
}

bool ndm_i_call_end(const ndm_i_call *call)
{
    if (atomic_fetch_sub(&call->entry->state, ONE_CALL) - ONE_CALL != (call->idle | DOOMED))
        return true;
    atomic_store(&call->entry->state, call->idle); /* it was doomed, and nobody else may touch it now */
    return false;
}
