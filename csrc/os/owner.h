/* Who is calling: which thread of which process.
 *
 * Threads and processes get numbers of our own, never used again, because the system reuses its own (thread
 * handles, TLS addresses, pids). The process number lives in a page that the kernel zeroes in a forked child
 * (MADV_WIPEONFORK), so that even a raw fork is noticed, at the price of one load.
 */
#ifndef NDM_OWNER_H
#define NDM_OWNER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct {
    _Atomic uint64_t thread; /* atomic: other threads compare it while the owner closes */
    uint64_t process;
} ndm_i_owner;

/* The page is set up by ndm_i_process(); until then every comparison fails. */
extern _Thread_local uint64_t ndm_i_this_thread;
extern const volatile uint64_t *_Atomic ndm_i_process_word;

/* The number of the calling process; 0 when the page cannot be had (no memory). */
uint64_t ndm_i_process(void);

/* The calling thread as an owner; .process is 0 when ndm_i_process() failed. */
ndm_i_owner ndm_i_owner_here(void);

static inline bool ndm_i_is_process(uint64_t process)
{
    return *atomic_load_explicit(&ndm_i_process_word, memory_order_relaxed) == process;
}

static inline bool ndm_i_is_owner(const ndm_i_owner *owner)
{
    return ndm_i_this_thread == atomic_load_explicit(&owner->thread, memory_order_relaxed) && ndm_i_is_process(owner->process);
}

#endif
