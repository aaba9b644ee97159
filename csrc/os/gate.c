/* See gate.h. */
#include "os/gate.h"

#include <assert.h>

void ndm_i_gate_share(ndm_i_gate *gate)
{
    pthread_mutex_init(&gate->lock, NULL);
    pthread_cond_init(&gate->back, NULL);
    gate->shared = true;
}

void ndm_i_gate_fini(ndm_i_gate *gate)
{
    if (!gate->shared)
        return;
    pthread_cond_destroy(&gate->back);
    pthread_mutex_destroy(&gate->lock);
    gate->shared = false;
}

void ndm_i_gate_lock(ndm_i_gate *gate) { pthread_mutex_lock(&gate->lock); }

bool ndm_i_gate_trylock(ndm_i_gate *gate) { return pthread_mutex_trylock(&gate->lock) == 0; }

void ndm_i_gate_unlock(ndm_i_gate *gate)
{
    gate->lets = false;
    pthread_mutex_unlock(&gate->lock);
}

void ndm_i_gate_wake(ndm_i_gate *gate) { pthread_cond_broadcast(&gate->back); }

bool ndm_i_gate_let(ndm_i_gate *gate)
{
    if (!gate || !gate->lets)
        return false;
    gate->outside++;
    ndm_i_gate_unlock(gate);
    return true;
}

void ndm_i_gate_come_back(ndm_i_gate *gate, bool let)
{
    if (!let)
        return;
    ndm_i_gate_lock(gate);
    assert(gate->outside > 0 && !gate->lets);
    gate->lets = true;
    if (--gate->outside == 0)
        ndm_i_gate_wake(gate);
}

void ndm_i_gate_wait(ndm_i_gate *gate)
{
    gate->lets = false;
    gate->outside++;
    pthread_cond_wait(&gate->back, &gate->lock);
    if (--gate->outside == 0)
        ndm_i_gate_wake(gate);
}

void ndm_i_gate_await(ndm_i_gate *gate)
{
    gate->lets = false;
    while (gate->outside > 0)
        pthread_cond_wait(&gate->back, &gate->lock);
}
