/* See number.h. A number is a place in a table, and above it how often the place was given out: an old number fits no more.
 * A place's word is that count and the calls that are running by it; while a place is free its count is even. */
#include "governor/number.h"

#include "governor/governor.h"
#include "os/status.h"

#include <sched.h>

enum { PLACES = 1024, CALL_BITS = 32 };

static struct {
    _Atomic uint64_t word;
    _Atomic(ndm_governor *) governor;
} places[PLACES];

static uint64_t count_of(uint64_t word) { return word >> CALL_BITS; }

/* A place for the governor; 0: all are taken. */
static uint64_t take(ndm_governor *governor)
{
    for (uint64_t place = 0; place < PLACES; place++) {
        const uint64_t count = count_of(places[place].word);
        ndm_governor *nobody = NULL;
        if (count % 2 != 0 || count > INT32_MAX / 2 ||
            !atomic_compare_exchange_strong(&places[place].governor, &nobody, governor))
            continue;
        const uint64_t word = (count_of(places[place].word) + 1) << CALL_BITS;
        places[place].word = word;
        return word | place;
    }
    return 0;
}

static void leave(uint64_t number)
{
    const uint64_t place = (uint32_t)number;
    places[place].word = (count_of(number) + 1) << CALL_BITS;
    atomic_store(&places[place].governor, NULL);
}

uint64_t ndm_governor_handle(ndm_governor *governor)
{
    if (!governor) {
        ndm_i_fail(NDM_ERR_CLOSED, "no governor");
        return 0;
    }
    uint64_t number = governor->handle;
    if (number != 0)
        return number;
    const uint64_t mine = take(governor);
    if (mine == 0)
        ndm_i_fail(NDM_ERR_MEMORY, "no place for another handle");
    else if (!atomic_compare_exchange_strong(&governor->handle, &number, mine))
        leave(mine); /* another thread was first, and nobody knows this one */
    return number != 0 ? number : mine;
}

ndm_governor *ndm_i_number_begin(uint64_t number)
{
    const uint64_t place = (uint32_t)number;
    if (place < PLACES) {
        uint64_t word = atomic_load(&places[place].word);
        while (count_of(word) == count_of(number) && count_of(word) % 2 != 0)
            if (atomic_compare_exchange_weak(&places[place].word, &word, word + 1))
                return atomic_load(&places[place].governor);
    }
    ndm_i_fail(NDM_ERR_CLOSED, "the handle's governor is gone");
    return NULL;
}

void ndm_i_number_end(uint64_t number) { atomic_fetch_sub(&places[(uint32_t)number].word, 1); }

void ndm_i_number_retire(ndm_governor *governor)
{
    const uint64_t number = governor->handle;
    if (number == 0)
        return;
    const uint64_t place = (uint32_t)number;
    uint64_t idle = count_of(number) << CALL_BITS;
    while (!atomic_compare_exchange_weak(&places[place].word, &idle, (count_of(number) + 1) << CALL_BITS)) {
        idle = count_of(number) << CALL_BITS;
        if (!ndm_i_is_process(governor->process))
            break; /* a forked child that no handler saw */
        sched_yield();
    }
    leave(number);
}

void ndm_i_number_renew(ndm_governor *governor)
{
    const uint64_t number = governor->handle;
    if (number != 0)
        places[(uint32_t)number].word = count_of(number) << CALL_BITS;
}
