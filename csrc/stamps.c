#include "stamps.h"

#include "nodedb_mem.h"
#include "owner.h"

#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

enum { MOST = 8192 }; /* a view that a binding keeps may cost it some 500 bytes */

#define DROPPED ((uint64_t)1 << 63)

/* The holders are counted in front of the words, in the same pages: in a forked child the count is 0, and releasing
 * does nothing. */
enum { HEADER = 8 };

#define BYTES ((HEADER + (size_t)NDM_STAMPS + 1) * sizeof(uint64_t))

static _Atomic uint64_t *holders_of(const uint64_t *words)
{
    return (_Atomic uint64_t *)(uintptr_t)(words - HEADER);
}

void ndm_stamps_release(const uint64_t *words)
{
    if (words && atomic_load(holders_of(words)) != 0 && atomic_fetch_sub(holders_of(words), 1) == 1)
        ndm_i_wiped_free((uint64_t *)(uintptr_t)words - HEADER, BYTES);
}

bool ndm_i_stamps_share(ndm_i_stamps *stamps)
{
    if (!stamps->words) {
        uint64_t *pages = ndm_i_wiped_new(BYTES);
        if (!pages)
            return false;
        stamps->words = pages + HEADER;
        stamps->last = NDM_STAMP_WORTH;
        atomic_store(holders_of(stamps->words), 1);
    }
    atomic_fetch_add(holders_of(stamps->words), 1);
    return true;
}

void ndm_i_stamps_fini(ndm_i_stamps *stamps)
{
    ndm_stamps_release(stamps->words);
    stamps->words = NULL;
}

void ndm_i_stamps_clear(ndm_i_stamps *stamps)
{
    if (stamps->words)
        memset(stamps->words, 0, stamps->end * sizeof *stamps->words);
    stamps->numbered = stamps->refused = stamps->end = 0;
}

/* The slot's word, NULL if it has none. */
static uint64_t *word_of(const ndm_i_stamps *stamps, int64_t slot)
{
    return stamps->words && slot < NDM_STAMPS ? &stamps->words[slot] : NULL;
}

void ndm_i_stamps_copied(ndm_i_stamps *stamps, int64_t slot)
{
    uint64_t *word = word_of(stamps, slot);
    if (word && *word < NDM_STAMP_WORTH && (stamps->numbered < MOST || ++stamps->refused > MOST))
        ++*word;
}

bool ndm_i_stamps_viewed(ndm_i_stamps *stamps, int64_t slot, uint64_t *number)
{
    uint64_t *word = word_of(stamps, slot);
    if (!word)
        return false;
    if (*word > NDM_STAMP_WORTH) {
        *number = *word &= ~DROPPED;
        return true;
    }
    if (stamps->numbered == MOST) {
        *word = 0;
        if (++stamps->refused <= MOST)
            return false;
        ndm_i_stamps_clear(stamps);
        *number = 0;
        return true;
    }
    if (*word == 0) {
        *word = 1;
        return false;
    }
    stamps->numbered++;
    if (stamps->end <= (uint64_t)slot)
        stamps->end = (uint64_t)slot + 1;
    *number = *word = ++stamps->last;
    stamps->words[NDM_STAMPS] = *number | DROPPED; /* for nobody to take it for a slot's */
    return true;
}

uint64_t ndm_i_stamps_freed(ndm_i_stamps *stamps, int64_t slot)
{
    uint64_t *word = word_of(stamps, slot);
    if (!word || *word == 0)
        return 0;
    const uint64_t number = *word & ~DROPPED;
    *word = 0;
    if (number <= NDM_STAMP_WORTH)
        return 0;
    stamps->numbered--;
    return number;
}

bool ndm_i_stamps_is_good(const ndm_i_stamps *stamps, int64_t slot)
{
    const uint64_t *word = word_of(stamps, slot);
    return word && *word > NDM_STAMP_WORTH && !(*word & DROPPED);
}

void ndm_i_stamps_dropped(ndm_i_stamps *stamps, int64_t slot)
{
    uint64_t *word = word_of(stamps, slot);
    if (word && *word > NDM_STAMP_WORTH)
        *word |= DROPPED;
}

uint64_t ndm_i_stamps_check(const ndm_i_stamps *stamps)
{
    uint64_t numbered = 0, broken = stamps->end > NDM_STAMPS || stamps->numbered > MOST;
    for (uint64_t i = 0; broken == 0 && i < stamps->end; i++) {
        numbered += stamps->words[i] > NDM_STAMP_WORTH;
        broken += (stamps->words[i] & ~DROPPED) > stamps->last;
    }
    return broken + (numbered != stamps->numbered);
}
