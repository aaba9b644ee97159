/* See grains.h. */
#include "store/grains.h"

#include <stdlib.h>
#include <string.h>

enum { HUGE = NDM_I_HUGE / NDM_I_GRAIN }; /* grains of a huge folio */

static void free_tables(const ndm_i_grains *grains)
{
    free((void *)grains->states);
    free((void *)grains->marks);
    free(grains->large);
    free(grains->rounds);
}

bool ndm_i_grains_reserve(ndm_i_grains *grains, uint64_t count)
{
    if (count <= grains->room)
        return true;
    uint8_t *states = calloc(count, 1), *marks = calloc(count, 1), *large = calloc(count, 1), *rounds = calloc(count, 1);
    if (!states || !marks || !large || !rounds) {
        free(states);
        free(marks);
        free(large);
        free(rounds);
        return false;
    }
    if (grains->room > 0) {
        memcpy(states, (void *)grains->states, grains->room);
        memcpy(marks, (void *)grains->marks, grains->room);
        memcpy(large, grains->large, grains->room);
        memcpy(rounds, grains->rounds, grains->room);
    }
    free_tables(grains);
    grains->states = (_Atomic uint8_t *)states;
    grains->marks = (_Atomic uint8_t *)marks;
    grains->large = large;
    grains->rounds = rounds;
    grains->room = count;
    return true;
}

void ndm_i_grains_fini(ndm_i_grains *grains)
{
    free_tables(grains);
    *grains = (ndm_i_grains){0};
}

void ndm_i_grains_adopt(ndm_i_grains *grains, uint64_t offset, uint64_t size)
{
    for (uint64_t grain = offset / NDM_I_GRAIN; grain < ndm_i_grains_end(offset + size); grain++) {
        ndm_i_grain_set_state(grains, grain, NDM_I_PARTIAL);
        if (grains->huge_folios)
            ndm_i_grain_mark(grains, grain, NDM_I_WIDE);
    }
}

void ndm_i_grains_adopt_rest(ndm_i_grains *grains, uint64_t capacity)
{
    for (uint64_t grain = 0; grain < ndm_i_grains_end(capacity); grain++) {
        if (ndm_i_grain_state(grains, grain) == NDM_I_EMPTY)
            ndm_i_grain_set_state(grains, grain, NDM_I_HOLE);
        if (grains->huge_folios)
            ndm_i_grain_mark(grains, grain, NDM_I_WIDE);
    }
}

bool ndm_i_grains_are_wide(const ndm_i_grains *grains, uint64_t grain)
{
    bool wide = false;
    for (uint64_t i = grain / HUGE * HUGE; !wide && i < grain / HUGE * HUGE + HUGE; i++)
        wide = ndm_i_grain_is(grains, i, NDM_I_WIDE);
    return wide;
}

void ndm_i_grains_widen(const ndm_i_grains *grains, uint64_t *first, uint64_t *last, uint64_t count)
{
    if (*last <= *first)
        return;
    if (ndm_i_grains_are_wide(grains, *last - 1))
        *last = ndm_i_max(*last, ndm_i_min(ndm_i_round_up(*last, HUGE), count));
    if (ndm_i_grains_are_wide(grains, *first))
        *first = ndm_i_round_down(*first, HUGE);
}

void ndm_i_grains_doubt(ndm_i_grains *grains, uint64_t first, uint64_t last)
{
    ndm_i_grains_widen(grains, &first, &last, grains->room);
    for (uint64_t grain = first; grain < last; grain++)
        if (ndm_i_grain_state(grains, grain) >= NDM_I_READY)
            ndm_i_grain_set_state(grains, grain, NDM_I_PARTIAL);
}

bool ndm_i_grains_have(const ndm_i_grains *grains, uint64_t offset, uint64_t end, uint8_t state)
{
    bool found = false;
    for (uint64_t grain = offset / NDM_I_GRAIN; !found && grain < ndm_i_grains_end(end); grain++)
        found = ndm_i_grain_state(grains, grain) == state;
    return found;
}

uint64_t ndm_i_grains_check(const ndm_i_grains *grains, uint64_t capacity)
{
    const uint8_t known = NDM_I_QUEUED | NDM_I_RECENT | NDM_I_WIDE;
    uint64_t broken = grains->room < ndm_i_grains_end(capacity);
    for (uint64_t grain = 0; grain < grains->room; grain++) {
        const uint8_t state = atomic_load(&grains->states[grain]), marks = atomic_load(&grains->marks[grain]);
        broken += state > NDM_I_DROPPED || (marks & ~known) != 0;
        broken += grain >= ndm_i_grains_end(capacity) && (state != NDM_I_EMPTY || marks != 0);
        broken += grain * NDM_I_HUGE >= capacity && grains->large[grain] != 0;
    }
    return broken;
}
