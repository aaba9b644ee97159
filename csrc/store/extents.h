/* Free space: which units of the file are used and which are free. Integers only; no system call, no pointer
 * into the file.
 *
 * The space is counted in units (one unit is `alignment` bytes of the file). The units [0, mark) are partitioned
 * into extents, each used or free, so that every extent but the first and last has two neighbours. No two free
 * extents are neighbours: a released extent joins the free ones it touches at once.
 *
 * Two indexes, kept consistent by construction:
 *   by address  every extent is a node in one doubly linked list, so neighbours are one step away;
 *   by size     free extents sit in bins, one per power of two; a bin is a bitwise trie on the length, and
 *               extents of the same length form a chain, newest first. A bit map tells which bins are empty.
 *               Those that the holder has brought near, to be used first, have bins of their own.
 * Finding the best fit, taking and releasing cost O(log length) steps, whatever the number of extents.
 *
 * An extent is named by the index of its node, which stays the same until it is released. A used extent carries
 * its holder's `tag` (the slot number). A node is 40 bytes.
 */
#ifndef NDM_EXTENTS_H
#define NDM_EXTENTS_H

#include <stdbool.h>
#include <stdint.h>

#define NDM_I_NONE UINT32_MAX /* no extent; no tag */

typedef struct ndm_i_node ndm_i_node;

/* Free extents by length. */
typedef struct {
    uint64_t map;       /* bit b: bin b has an extent */
    uint32_t roots[64]; /* trie roots; bin b holds lengths in [2^b, 2^(b+1)) */
} ndm_i_bins;

typedef struct {
    ndm_i_node *nodes;
    uint32_t node_count;    /* nodes ever used; the rest of `nodes` is room */
    uint32_t node_room;
    uint32_t spare;         /* chain of nodes ready for reuse */
    uint32_t spare_count;
    uint32_t first, last;   /* ends of the address list */
    uint32_t lowest;        /* no free extent lies before this one; NDM_I_NONE: nor anywhere */
    uint32_t free_count;
    uint64_t mark;          /* end of the last extent: the high-water mark, in units */
    uint64_t free_units;    /* sum over the free extents */
    uint32_t cursor;        /* where a walk through the extents goes on; NDM_I_NONE: at the first */
    ndm_i_bins bins;
    ndm_i_bins near;        /* the free extents that were brought near */
} ndm_i_extents;

/* Where a value would go. `hole` is the free extent whose start it would take, or NDM_I_NONE for fresh space at
 * the mark. Good until the next change. */
typedef struct {
    uint64_t offset;
    uint32_t hole;
    bool near; /* the hole was brought near */
} ndm_i_place;

void ndm_i_extents_init(ndm_i_extents *extents);
void ndm_i_extents_fini(ndm_i_extents *extents);

/* The best place for `length` units (1 or more): the start of the shortest free extent that holds them; if none
 * does, the start of the free extent that touches the mark; if there is none, the mark. Changes nothing. In the
 * last two cases offset + length lies beyond the mark: the caller sees to the room there before taking it. An extent
 * that was brought near is taken for the best while it is no more than twice as long. */
ndm_i_place ndm_i_extents_find(const ndm_i_extents *extents, uint64_t length);

/* The start of the shortest free extent that holds `length` units, of those that are near, or of the others. */
ndm_i_place ndm_i_extents_find_in(const ndm_i_extents *extents, bool near, uint64_t length);

/* From now on a free extent is `near`, to be used before others of its size, and so is what is left of it; or it is like
 * any other again. Released or slid it is like any other, too, if it joins a neighbour. Cannot fail. */
void ndm_i_extents_prefer(ndm_i_extents *extents, uint32_t extent, bool near);

/* Make sure that the next ndm_i_extents_take() needs no memory. false: malloc failed, or 2^32 - 5 nodes exist. */
bool ndm_i_extents_reserve(ndm_i_extents *extents);

/* The same for the next `count` takes. */
bool ndm_i_extents_reserve_many(ndm_i_extents *extents, uint64_t count);

/* Take what find() found; the rest of a hole stays free. Cannot fail after reserve(). Returns the extent. */
uint32_t ndm_i_extents_take(ndm_i_extents *extents, ndm_i_place place, uint64_t length, uint32_t tag);

/* Give a used extent back; it joins its free neighbours. Its name is void afterwards. Cannot fail. */
void ndm_i_extents_release(ndm_i_extents *extents, uint32_t extent);

uint64_t ndm_i_extents_offset(const ndm_i_extents *extents, uint32_t extent);
uint64_t ndm_i_extents_length(const ndm_i_extents *extents, uint32_t extent);
bool ndm_i_extents_is_free(const ndm_i_extents *extents, uint32_t extent);
bool ndm_i_extents_is_used(const ndm_i_extents *extents, uint32_t extent); /* of any number */
uint32_t ndm_i_extents_tag(const ndm_i_extents *extents, uint32_t extent);
void ndm_i_extents_set_tag(ndm_i_extents *extents, uint32_t extent, uint32_t tag);

/* Walk in address order: the first extent, and the one after (or before) a given one; NDM_I_NONE at the end. */
uint32_t ndm_i_extents_first(const ndm_i_extents *extents);
uint32_t ndm_i_extents_next(const ndm_i_extents *extents, uint32_t extent);
uint32_t ndm_i_extents_previous(const ndm_i_extents *extents, uint32_t extent);

uint32_t ndm_i_extents_last(const ndm_i_extents *extents);

/* The first free extent in address order, NDM_I_NONE if there is none. Walks only what no earlier call has walked,
 * unless something has been released below since. */
uint32_t ndm_i_extents_first_hole(ndm_i_extents *extents);

/* The longest free extent, NDM_I_NONE if there is none; its length, or 0. */
uint32_t ndm_i_extents_longest(const ndm_i_extents *extents);
uint64_t ndm_i_extents_largest(const ndm_i_extents *extents);

/* Exchange a free extent with the used one right after it: the used one starts where the hole started, the hole
 * follows it and joins a free neighbour there. Returns the hole after the exchange. Cannot fail. The caller has
 * moved the bytes. */
uint32_t ndm_i_extents_slide(ndm_i_extents *extents, uint32_t hole);

/* Lower the mark past the free extent that touches it, if there is one. Returns the mark. */
uint64_t ndm_i_extents_trim(ndm_i_extents *extents);

/* Undo takes at the end: lower the mark to `mark`, which lies in, or at an end of, the free extent that touches it.
 * Does nothing if the mark is there already. */
void ndm_i_extents_lower(ndm_i_extents *extents, uint64_t mark);

#endif
