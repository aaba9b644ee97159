/* Who is calling: which thread of which process. And who owns a thing.
 *
 * Threads and processes get numbers of our own, never used again, because the system reuses its own (thread
 * handles, TLS addresses, pids). The process number lives in a page that the kernel zeroes in a forked child
 * (MADV_WIPEONFORK), so that even a raw fork is noticed, at the price of one load.
 *
 * Whether the caller owns a thing is decided by one load of one word: the number of the owning thread, or one of three that
 * no thread has.
 */
#ifndef NDM_OWNER_H
#define NDM_OWNER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define NDM_I_CLOSED UINT64_MAX         /* nobody's, for ever */
#define NDM_I_RELEASED (UINT64_MAX - 1) /* nobody's: whoever adopts it first */
#define NDM_I_SHARED (UINT64_MAX - 2)   /* every thread's of the process: whoever has the lock (gate.h) */

typedef struct {
    _Atomic uint64_t holder; /* the owning thread's number, or one of those above */
    _Atomic bool changing;   /* a thread is adopting it */
    struct ndm_i_thread *thread; /* the owning thread, which may have ended; kept while this is */
    uint64_t process;
} ndm_i_owner;

/* The page is set up by ndm_i_process(); until then every comparison fails. The calling thread's number is 0 until it owns
 * something. */
extern _Thread_local uint64_t ndm_i_this_thread;
extern const volatile uint64_t *_Atomic ndm_i_process_word;

/* The number of the calling process; 0 when the page cannot be had (no memory). */
uint64_t ndm_i_process(void);

static inline bool ndm_i_is_process(uint64_t process)
{
    return *atomic_load_explicit(&ndm_i_process_word, memory_order_relaxed) == process;
}

/* The calling thread becomes the owner. false: no memory. */
bool ndm_i_owner_init(ndm_i_owner *owner);

/* What was just initialised is every thread's of the process, until it is closed. */
void ndm_i_owner_share(ndm_i_owner *owner);

/* Whoever decides anything loads the holder once. */
static inline uint64_t ndm_i_owner_holder(const ndm_i_owner *owner)
{
    return atomic_load_explicit(&owner->holder, memory_order_relaxed);
}

static inline bool ndm_i_owner_is_closed(const ndm_i_owner *owner) { return ndm_i_owner_holder(owner) == NDM_I_CLOSED; }

/* Nobody owns it from now on. false: it was closed already; only who gets true ends what is owned. */
bool ndm_i_owner_close(ndm_i_owner *owner);

/* What is closed is about to be freed: no call on it is running or follows. */
void ndm_i_owner_fini(ndm_i_owner *owner);

/* The owner lets go: another thread may adopt it. Owner only. */
void ndm_i_owner_release(ndm_i_owner *owner);

/* The calling thread becomes the owner, if nobody is: it was released, or its thread has ended. What the thread before
 * did is seen. 0; EPERM if another thread of this process, or another process, owns it; ENOMEM. */
int ndm_i_owner_adopt(ndm_i_owner *owner);

#endif
