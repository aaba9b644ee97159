/* Stamps: what a binding needs to hand out a view again without a call.
 *
 * Each slot has one: up to NDM_STAMP_WORTH it counts how often the value has been copied out; above, it is the number
 * that the value got when it was viewed for the second time. No number is given twice in a region, and freeing the slot
 * takes it away: what is known by a number is good as long as the number stands there. The kernel zeroes the stamps in
 * a forked child (MADV_WIPEONFORK), where nothing is good.
 *
 * At most MOST values have a number. After as many reads that got none for that reason, all are taken back: what is
 * read now may get them. A value that is dropped from RAM keeps its number under a bit that makes it another one, until
 * it is viewed, and so fetched, again.
 */
#ifndef NDM_STAMPS_H
#define NDM_STAMPS_H

#include <stdbool.h>
#include <stdint.h>

typedef struct {
    uint64_t *words;   /* NULL until ndm_i_stamps_share(); the last holder frees them */
    uint64_t last;     /* number given */
    uint64_t numbered; /* values that have one */
    uint64_t refused;  /* reads since MOST had one */
    uint64_t end;      /* no slot from here on has a number */
    uint64_t drops;    /* of the cache, that have been taken into account */
} ndm_i_stamps;

/* Make the words if there are none, and count one more holder. false: no memory, or no fork detection. */
bool ndm_i_stamps_share(ndm_i_stamps *stamps);

/* Let go of the words. */
void ndm_i_stamps_fini(ndm_i_stamps *stamps);

/* Take all numbers back. */
void ndm_i_stamps_clear(ndm_i_stamps *stamps);

/* The value in the slot is copied out. */
void ndm_i_stamps_copied(ndm_i_stamps *stamps, int64_t slot);

/* It is viewed. True if it has a number, or if all numbers were taken back (0). */
bool ndm_i_stamps_viewed(ndm_i_stamps *stamps, int64_t slot, uint64_t *number);

/* It is freed. Returns its number, 0 if it has none. */
uint64_t ndm_i_stamps_freed(ndm_i_stamps *stamps, int64_t slot);

/* It is dropped from RAM. */
void ndm_i_stamps_dropped(ndm_i_stamps *stamps, int64_t slot);

/* Has it a number that stands there undisguised? */
bool ndm_i_stamps_is_good(const ndm_i_stamps *stamps, int64_t slot);

/* How many invariants of the stamps are broken. */
uint64_t ndm_i_stamps_check(const ndm_i_stamps *stamps);

#endif
