/* The bins of extents.c: free extents by their length, in a bitwise trie for each power of two (see extents_node.h). There
 * are two sets of bins. Those near hold the extents that are to be used first, `bins` all others.
 */
#ifndef NDM_EXTENTS_BINS_H
#define NDM_EXTENTS_BINS_H

#include "store/extents_node.h"

#include <assert.h>
#include <stddef.h>

static unsigned bin_of(uint64_t length)
{
    return 63u - (unsigned)__builtin_clzll(length);
}

/* Index a free extent by its length in one of the two sets, and count it. */
static void bin_insert(extents_t *extents, ndm_i_bins *bins, uint32_t index)
{
    node_t *nodes = extents->nodes;
    node_t *node = &nodes[index];
    uint64_t length = node->length;
    unsigned bin = bin_of(length);
    unsigned shift = bin;
    uint32_t up = ROOT;
    uint32_t *link = &bins->roots[bin];

    extents->free_count++;
    extents->free_units += length;
    while (*link != NONE) {
        node_t *at = &nodes[*link];
        if (at->length == length) {
            node->child[0] = *link;
            node->up = MEMBER;
            node->same = at->same;
            if (at->same != NONE)
                nodes[at->same].child[0] = index;
            at->same = index;
            return;
        }
        assert(shift > 0); /* with no bit left the lengths are equal */
        up = *link;
        link = &at->child[length >> --shift & 1];
    }
    *link = index;
    node->child[0] = node->child[1] = NONE;
    node->up = up;
    node->same = NONE;
    bins->map |= UINT64_C(1) << bin;
}

/* The set that has a trie's root. */
static ndm_i_bins *bins_of(extents_t *extents, uint32_t root)
{
    return extents->near.roots[bin_of(extents->nodes[root].length)] == root ? &extents->near : &extents->bins;
}

/* The link that leads to a trie node from above. */
static uint32_t *link_to(extents_t *extents, uint32_t index)
{
    const node_t *node = &extents->nodes[index];
    if (node->up == ROOT)
        return &bins_of(extents, index)->roots[bin_of(node->length)];
    node_t *parent = &extents->nodes[node->up];
    return &parent->child[parent->child[1] == index];
}

/* Cut off some leaf below a trie node and return it; NONE if the node is a leaf itself. */
static uint32_t cut_leaf(extents_t *extents, uint32_t index)
{
    node_t *nodes = extents->nodes;
    uint32_t *link = NULL;
    for (;;) {
        node_t *at = &nodes[index];
        unsigned side = at->child[1] != NONE;
        if (at->child[side] == NONE)
            break;
        link = &at->child[side];
        index = *link;
    }
    if (link == NULL)
        return NONE;
    *link = NONE;
    return index;
}

/* Undo bin_insert(). The length must still be the one inserted. */
static void bin_remove(extents_t *extents, uint32_t index)
{
    node_t *nodes = extents->nodes;
    node_t *node = &nodes[index];
    assert(is_free(node));

    extents->free_count--;
    extents->free_units -= node->length;
    if (node->up == MEMBER) {
        nodes[node->child[0]].same = node->same;
        if (node->same != NONE)
            nodes[node->same].child[0] = node->child[0];
        return;
    }
    uint32_t heir = node->same != NONE ? node->same : cut_leaf(extents, index);
    if (heir == NONE && node->up == ROOT)
        bins_of(extents, index)->map &= ~(UINT64_C(1) << bin_of(node->length));
    *link_to(extents, index) = heir;
    if (heir == NONE)
        return;
    nodes[heir].up = node->up;
    for (int side = 0; side < 2; side++) {
        nodes[heir].child[side] = node->child[side];
        if (node->child[side] != NONE)
            nodes[node->child[side]].up = heir;
    }
}

/* The trie node with the shortest (side 0) or longest (side 1) length in a subtree. It is on the path that keeps to
 * that side. */
static uint32_t subtree_extreme(const node_t *nodes, uint32_t index, unsigned side)
{
    uint32_t best = index;
    while (index != NONE) {
        const node_t *at = &nodes[index];
        if (side == 0 ? at->length < nodes[best].length : at->length > nodes[best].length)
            best = index;
        index = at->child[at->child[side] != NONE ? side : 1 - side];
    }
    return best;
}

/* The trie node with the shortest length of at least `length` in the bin of `length`, or NONE. */
static inline __attribute__((always_inline)) uint32_t bin_best(const node_t *nodes, const ndm_i_bins *bins, uint64_t length)
{
    unsigned shift = bin_of(length);
    uint32_t index = bins->roots[shift];
    uint32_t best = NONE;
    uint32_t above = NONE; /* the nearest subtree of greater lengths that the path left aside */
    uint64_t best_length = UINT64_MAX;

    while (index != NONE) {
        const node_t *at = &nodes[index];
        if (at->length == length)
            return index;
        if (at->length > length && at->length < best_length) {
            best = index;
            best_length = at->length;
        }
        assert(shift > 0);
        unsigned side = length >> --shift & 1;
        if (side == 0 && at->child[1] != NONE)
            above = at->child[1];
        index = at->child[side];
    }
    if (above != NONE) {
        above = subtree_extreme(nodes, above, 0);
        if (nodes[above].length < best_length)
            best = above;
    }
    return best;
}

/* The extent freed last of the shortest that hold `length` units, or NONE. */
static inline __attribute__((always_inline)) uint32_t bins_best(const node_t *nodes, const ndm_i_bins *bins, uint64_t length)
{
    uint32_t best = bin_best(nodes, bins, length);
    if (best == NONE) {
        const uint64_t longer = bins->map & ~((UINT64_C(2) << bin_of(length)) - 1);
        if (longer != 0)
            best = subtree_extreme(nodes, bins->roots[__builtin_ctzll(longer)], 0);
    }
    return best != NONE && nodes[best].same != NONE ? nodes[best].same : best;
}

/* The extent freed last of the longest, or NONE. */
static uint32_t bins_longest(const node_t *nodes, const ndm_i_bins *bins)
{
    if (bins->map == 0)
        return NONE;
    const uint32_t longest = subtree_extreme(nodes, bins->roots[bin_of(bins->map)], 1);
    return nodes[longest].same != NONE ? nodes[longest].same : longest;
}

#endif
