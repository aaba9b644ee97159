#define _GNU_SOURCE
#include "store/seen.h"

#include <time.h>

/* Neighbours, small or of whole 64 KiB, have entries of their own. */
static uint64_t index_of(uint64_t offset) { return (offset >> 16 ^ offset >> 6) & (NDM_I_SEEN_ENTRIES - 1); }

uint64_t ndm_i_seen_moment(uint64_t drops)
{
    struct timespec now = {0};
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now); /* 5 ns */
    return ((uint64_t)now.tv_sec + 1) << 32 | (uint32_t)drops;
}

bool ndm_i_seen_at(const ndm_i_seen *seen, uint64_t offset, uint64_t moment)
{
    const uint64_t index = index_of(offset);
    return seen->entries[index].offset == offset && seen->entries[index].when == moment;
}

void ndm_i_seen_note(ndm_i_seen *seen, uint64_t offset, uint64_t moment)
{
    const uint64_t index = index_of(offset);
    seen->entries[index].offset = offset;
    seen->entries[index].when = moment;
}
