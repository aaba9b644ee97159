/* The lock of a thing that every thread of a process may use. Whoever holds it may let others in while it waits for the disk.
 *
 * Locks are taken in the order that fork.h gives: this one is a verb's. Nobody holds another lock while he waits for this
 * one. A forked child never takes it: its copy may be held by a thread that is gone.
 */
#ifndef NDM_GATE_H
#define NDM_GATE_H

#include <pthread.h>
#include <stdbool.h>

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t back; /* somebody has come back */
    unsigned outside;     /* threads that have let others in, and come back */
    bool shared;          /* false: the thing has one owner, and nobody takes the lock */
    bool lets;            /* whoever holds the lock may let others in now */
} ndm_i_gate;

/* All zeros are the gate of a thing with one owner. */
void ndm_i_gate_share(ndm_i_gate *gate);
void ndm_i_gate_fini(ndm_i_gate *gate);

void ndm_i_gate_lock(ndm_i_gate *gate);
bool ndm_i_gate_trylock(ndm_i_gate *gate);
void ndm_i_gate_unlock(ndm_i_gate *gate);

/* The rest is for whoever holds the lock.
 *
 * Let others in until come_back(), if that is allowed. Gives what come_back() has to know. NULL is a gate that lets nobody
 * in. */
bool ndm_i_gate_let(ndm_i_gate *gate);
void ndm_i_gate_come_back(ndm_i_gate *gate, bool let);

/* Others are in until wake(), which any of them may call. */
void ndm_i_gate_wait(ndm_i_gate *gate);
void ndm_i_gate_wake(ndm_i_gate *gate);

/* Wait until nobody is outside. */
void ndm_i_gate_await(ndm_i_gate *gate);

#endif
