/* Handles: numbers that stand for objects, for callers that cannot be trusted to know whether an object still lives. What
 * the objects are is the caller's affair.
 *
 * A handle is an index into a table and a generation. The table's entries are never freed, so that any number may be
 * looked up; an entry's generation grows when its handle is retired, and an old handle no longer fits. All of it is
 * lock-free: a forked child finds the table whole, and a wrong thread costs the owner nothing.
 *
 * An entry's state is its generation, the number of calls by handle that are running, and two flags:
 *   LIVE    it has an object
 *   DOOMED  the handle was retired meanwhile: the last of the running calls finishes that when it ends
 */
#ifndef NDM_HANDLES_H
#define NDM_HANDLES_H

#include <stdbool.h>
#include <stdint.h>

/* A handle for an object that this thread of this process alone may use, or with NDM_I_SHARED every thread of it (owner.h).
 * Never 0, below 2^63. 0: no memory. */
uint64_t ndm_i_handle_new(void *object, uint64_t thread, uint64_t process);

/* Another thread owns the object from now on; or nobody does (NDM_I_RELEASED). No call by the handle is running. */
void ndm_i_handle_pass(uint64_t handle, uint64_t thread);

/* The handle is stale from now on. false: another thread is inside a call by handle, and will hear of it from
 * ndm_i_call_end(). */
bool ndm_i_handle_retire(uint64_t handle);

/* A call by handle. */
typedef struct {
    void *object; /* it stays until ndm_i_call_end(), whoever retires the handle */
    struct ndm_i_handle_entry *entry;
    uint64_t idle;
} ndm_i_call;

/* Every call by handle begins here: NDM_ERR_CLOSED for a stale handle, NDM_ERR_WRONG_THREAD for anyone but the owner.
 * Nothing of the object is touched before it is held. */
int ndm_i_call_begin(uint64_t handle, ndm_i_call *call);

/* false: the handle was retired meanwhile, and no other call is running. It is stale now, and the caller does what had to
 * wait. */
bool ndm_i_call_end(const ndm_i_call *call);

#endif
