/* The checker of extents.h: trusts no index, and every walk is bounded by the number of nodes. */
#include "store/extents_check.h"

#include "store/extents_node.h"

#include <stddef.h>

/* The address list: a partition of [0, mark), no two free neighbours, true totals. Strictly growing offsets and
 * the bounded walk prove that no node occurs twice. */
static uint64_t check_list(const extents_t *extents, uint64_t *listed)
{
    uint64_t broken = 0, offset = 0, free_units = 0, free_count = 0;
    uint32_t prev = NONE;
    bool prev_free = false, reached = false, met = extents->cursor == NONE;
    uint32_t index = extents->first;
    *listed = 0;
    while (index != NONE) {
        if (index >= extents->node_count || *listed == extents->node_count)
            return broken + 1;
        const node_t *node = &extents->nodes[index];
        if (node->up == SPARE || node->up == NONE)
            return broken + 1;
        broken += node->prev != prev;
        broken += node->offset != offset;
        broken += node->length == 0 || node->length > UINT64_MAX - offset;
        broken += prev_free && is_free(node);
        reached = reached || index == extents->lowest;
        met = met || index == extents->cursor;
        broken += is_free(node) && !reached;
        prev_free = is_free(node);
        free_count += prev_free;
        free_units += prev_free ? node->length : 0;
        offset += node->length;
        prev = index;
        index = node->next;
        ++*listed;
    }
    broken += extents->last != prev;
    broken += extents->lowest != NONE && !reached;
    broken += !met;
    broken += extents->mark != offset;
    broken += extents->free_units != free_units;
    broken += extents->free_count != free_count;
    return broken;
}

/* The spare chain: a chain that ends holds no node twice. */
static uint64_t check_spare(const extents_t *extents)
{
    uint32_t count = 0;
    uint32_t index = extents->spare;
    for (; index != NONE && count < extents->spare_count; count++) {
        if (index >= extents->node_count || extents->nodes[index].up != SPARE)
            return 1;
        index = extents->nodes[index].next;
    }
    return index != NONE || count != extents->spare_count;
}

/* The trie below one link, and the chains in it; the lengths there begin with the bits `prefix`, `shift` bits
 * follow. That every node points back to where it was reached from proves that none is reached twice. `*left` is
 * how many more free extents there may be. At most 64 calls deep. */
static uint64_t check_trie(const extents_t *extents, uint32_t index, uint32_t up, uint64_t prefix, unsigned shift,
                           uint64_t *left) {
    if (index == NONE)
        return 0;
    if (index >= extents->node_count || *left == 0)
        return 1;
    const node_t *node = &extents->nodes[index];
    if (node->up != up || node->length >> shift != prefix)
        return 1;
    --*left;
    uint32_t newer = index;
    for (uint32_t same = node->same; same != NONE; same = extents->nodes[same].same) {
        if (same >= extents->node_count || *left == 0)
            return 1;
        const node_t *member = &extents->nodes[same];
        if (member->up != MEMBER || member->child[0] != newer || member->length != node->length)
            return 1;
        newer = same;
        --*left;
    }
    if (shift == 0)
        return node->child[0] != NONE || node->child[1] != NONE;
    return check_trie(extents, node->child[0], index, prefix << 1, shift - 1, left) +
           check_trie(extents, node->child[1], index, prefix << 1 | 1, shift - 1, left);
}

static uint64_t check_bins(const extents_t *extents, const ndm_i_bins *bins, uint64_t *left)
{
    uint64_t broken = 0;
    for (unsigned bin = 0; bin < 64; bin++) {
        broken += (bins->map >> bin & 1) != (bins->roots[bin] != NONE);
        broken += check_trie(extents, bins->roots[bin], ROOT, 1, bin, left);
    }
    return broken;
}

uint64_t ndm_i_extents_check(const ndm_i_extents *extents)
{
    if (extents->node_count > extents->node_room || (extents->node_room != 0 && extents->nodes == NULL))
        return 1;
    uint64_t listed;
    uint64_t broken = check_list(extents, &listed);
    broken += check_spare(extents);
    broken += listed + extents->spare_count != extents->node_count;

    uint64_t left = extents->free_count;
    broken += check_bins(extents, &extents->bins, &left) + check_bins(extents, &extents->near, &left);
    for (unsigned bin = 0; bin < 64; bin++) /* a trie is in one set */
        broken += extents->bins.roots[bin] != NONE && extents->bins.roots[bin] == extents->near.roots[bin];
    return broken + (left != 0);
}
