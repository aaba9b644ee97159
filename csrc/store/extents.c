/* Free space, see extents.h; what the nodes hold, see extents_node.h. */
#include "store/extents_node.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define ROOM_FIRST 64u
#define ROOM_MAX MEMBER

/* ---- nodes ---- */

/* Fetch a node that is about to be read or written; it may lie on two cache lines. */
static void fetch_ahead(const extents_t *extents, uint32_t index)
{
    if (index != NONE) {
        const node_t *node = &extents->nodes[index];
        __builtin_prefetch(&node->offset);
        __builtin_prefetch(&node->same);
    }
}

static uint32_t node_new(extents_t *extents)
{
    uint32_t index = extents->spare;
    if (index != NONE) {
        extents->spare = extents->nodes[index].next;
        extents->spare_count--;
        return index;
    }
    assert(extents->node_count < extents->node_room); /* else reserve() was not called */
    return extents->node_count++;
}

/* The two links of the address list that meet at a place: forward from `prev`, back from `next`. */
static void join(extents_t *extents, uint32_t prev, uint32_t next, uint32_t forward, uint32_t back)
{
    *(prev != NONE ? &extents->nodes[prev].next : &extents->first) = forward;
    *(next != NONE ? &extents->nodes[next].prev : &extents->last) = back;
}

static void node_unlink(extents_t *extents, uint32_t index)
{
    const node_t *node = &extents->nodes[index];
    join(extents, node->prev, node->next, node->next, node->prev);
}

/* Put a node into the address list behind `prev` (NONE: in front). */
static void node_link(extents_t *extents, uint32_t index, uint32_t prev)
{
    node_t *node = &extents->nodes[index];
    node->prev = prev;
    node->next = prev != NONE ? extents->nodes[prev].next : extents->first;
    join(extents, prev, node->next, index, index);
}

/* Take a node out of the address list and keep it for reuse. */
static void node_drop(extents_t *extents, uint32_t index)
{
    if (extents->lowest == index)
        extents->lowest = extents->nodes[index].prev != NONE ? extents->nodes[index].prev : extents->nodes[index].next;
    node_unlink(extents, index);
    extents->nodes[index].up = SPARE;
    extents->nodes[index].next = extents->spare;
    extents->spare = index;
    extents->spare_count++;
}

/* ---- bins: the free extents by length ---- */

static unsigned bin_of(uint64_t length)
{
    return 63u - (unsigned)__builtin_clzll(length);
}

/* Index a free extent by its length, and count it. */
static void bin_insert(extents_t *extents, uint32_t index)
{
    node_t *nodes = extents->nodes;
    node_t *node = &nodes[index];
    uint64_t length = node->length;
    unsigned bin = bin_of(length);
    unsigned shift = bin;
    uint32_t up = ROOT;
    uint32_t *link = &extents->bins[bin];

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
    extents->bin_map |= UINT64_C(1) << bin;
}

/* The link that leads to a trie node from above. */
static uint32_t *link_to(extents_t *extents, uint32_t index)
{
    const node_t *node = &extents->nodes[index];
    if (node->up == ROOT)
        return &extents->bins[bin_of(node->length)];
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
    *link_to(extents, index) = heir;
    if (heir == NONE) {
        if (node->up == ROOT)
            extents->bin_map &= ~(UINT64_C(1) << bin_of(node->length));
        return;
    }
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
static uint32_t bin_best(const extents_t *extents, uint64_t length)
{
    const node_t *nodes = extents->nodes;
    unsigned shift = bin_of(length);
    uint32_t index = extents->bins[shift];
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

/* ---- the interface ---- */

void ndm_i_extents_init(ndm_i_extents *extents)
{
    memset(extents, 0, sizeof *extents);
    extents->spare = extents->first = extents->last = extents->lowest = NONE;
    for (int bin = 0; bin < 64; bin++)
        extents->bins[bin] = NONE;
}

void ndm_i_extents_fini(ndm_i_extents *extents)
{
    free(extents->nodes);
    ndm_i_extents_init(extents);
}

ndm_i_place ndm_i_extents_find(const ndm_i_extents *extents, uint64_t length)
{
    const node_t *nodes = extents->nodes;
    assert(length > 0);
    uint32_t best = bin_best(extents, length);
    if (best == NONE) {
        uint64_t longer = extents->bin_map & ~((UINT64_C(2) << bin_of(length)) - 1);
        if (longer != 0)
            best = subtree_extreme(nodes, extents->bins[__builtin_ctzll(longer)], 0);
    }
    if (best != NONE && nodes[best].same != NONE)
        best = nodes[best].same;
    if (best == NONE && extents->last != NONE && is_free(&nodes[extents->last]))
        best = extents->last;
    return (ndm_i_place){best != NONE ? nodes[best].offset : extents->mark, best};
}

bool ndm_i_extents_reserve(ndm_i_extents *extents)
{
    return extents->spare != NONE || extents->node_count < extents->node_room ||
           ndm_i_extents_reserve_many(extents, 1);
}

bool ndm_i_extents_reserve_many(ndm_i_extents *extents, uint64_t count)
{
    uint32_t room = extents->node_room;
    if (count > ROOM_MAX - extents->node_count)
        return false;
    while (room - extents->node_count < count)
        room = room == 0 ? ROOM_FIRST : room > ROOM_MAX / 2 ? ROOM_MAX : room * 2;
    if (room == extents->node_room)
        return true;
    node_t *nodes = realloc(extents->nodes, room * sizeof *nodes);
    if (nodes == NULL)
        return false;
    extents->nodes = nodes;
    extents->node_room = room;
    return true;
}

uint32_t ndm_i_extents_take(ndm_i_extents *extents, ndm_i_place place, uint64_t length, uint32_t tag)
{
    uint32_t index = place.hole;
    assert(length > 0 && length <= UINT64_MAX - place.offset);
    if (index == NONE) {
        assert(place.offset == extents->mark);
        index = node_new(extents);
        extents->nodes[index].offset = place.offset;
        node_link(extents, index, extents->last);
        extents->mark = place.offset + length;
    } else {
        node_t *node = &extents->nodes[index];
        assert(index < extents->node_count && is_free(node) && node->offset == place.offset);
        fetch_ahead(extents, node->next);
        bin_remove(extents, index);
        if (node->length > length) {
            uint32_t rest = node_new(extents);
            extents->nodes[rest].offset = place.offset + length;
            extents->nodes[rest].length = node->length - length;
            node_link(extents, rest, index);
            bin_insert(extents, rest);
            if (extents->lowest == NONE)
                extents->lowest = rest;
        } else if (node->length < length) {
            assert(index == extents->last);
            extents->mark = place.offset + length;
        }
    }
    extents->nodes[index].length = length;
    extents->nodes[index].child[0] = tag;
    extents->nodes[index].up = USED;
    return index;
}

void ndm_i_extents_release(ndm_i_extents *extents, uint32_t extent)
{
    node_t *nodes = extents->nodes;
    node_t *node = &nodes[extent];
    assert(extent < extents->node_count && node->up == USED);
    uint32_t prev = node->prev;
    uint32_t next = node->next;
    fetch_ahead(extents, prev);
    fetch_ahead(extents, next);

    /* Of two that join, the neighbour stays and the node between goes: that changes no further node. */
    if (next != NONE && is_free(&nodes[next])) {
        bin_remove(extents, next);
        nodes[next].offset = node->offset;
        nodes[next].length += node->length;
        node_drop(extents, extent);
        extent = next;
        node = &nodes[next];
    }
    if (prev != NONE && is_free(&nodes[prev])) {
        bin_remove(extents, prev);
        nodes[prev].length += node->length;
        node_drop(extents, extent);
        extent = prev;
    }
    bin_insert(extents, extent);
    if (extents->lowest == NONE || nodes[extent].offset < nodes[extents->lowest].offset)
        extents->lowest = extent;
}

static const node_t *node_at(const extents_t *extents, uint32_t index)
{
    assert(index < extents->node_count && extents->nodes[index].up != SPARE);
    return &extents->nodes[index];
}

uint64_t ndm_i_extents_offset(const ndm_i_extents *extents, uint32_t extent)
{
    return node_at(extents, extent)->offset;
}

uint64_t ndm_i_extents_length(const ndm_i_extents *extents, uint32_t extent)
{
    return node_at(extents, extent)->length;
}

bool ndm_i_extents_is_free(const ndm_i_extents *extents, uint32_t extent)
{
    return is_free(node_at(extents, extent));
}

bool ndm_i_extents_is_used(const ndm_i_extents *extents, uint32_t extent)
{
    return extent < extents->node_count && extents->nodes[extent].up == USED;
}

uint32_t ndm_i_extents_tag(const ndm_i_extents *extents, uint32_t extent)
{
    const node_t *node = node_at(extents, extent);
    return is_free(node) ? NONE : node->child[0];
}

void ndm_i_extents_set_tag(ndm_i_extents *extents, uint32_t extent, uint32_t tag)
{
    assert(extent < extents->node_count && extents->nodes[extent].up == USED);
    extents->nodes[extent].child[0] = tag;
}

uint32_t ndm_i_extents_first(const ndm_i_extents *extents)
{
    return extents->first;
}

uint32_t ndm_i_extents_next(const ndm_i_extents *extents, uint32_t extent)
{
    return node_at(extents, extent)->next;
}

uint32_t ndm_i_extents_previous(const ndm_i_extents *extents, uint32_t extent)
{
    return node_at(extents, extent)->prev;
}

uint32_t ndm_i_extents_last(const ndm_i_extents *extents)
{
    return extents->last;
}

uint32_t ndm_i_extents_first_hole(ndm_i_extents *extents)
{
    uint32_t index = extents->lowest;
    while (index != NONE && !is_free(&extents->nodes[index]))
        index = extents->nodes[index].next;
    return extents->lowest = index;
}

uint64_t ndm_i_extents_largest(const ndm_i_extents *extents)
{
    if (extents->bin_map == 0)
        return 0;
    uint32_t root = extents->bins[bin_of(extents->bin_map)];
    return extents->nodes[subtree_extreme(extents->nodes, root, 1)].length;
}

uint32_t ndm_i_extents_slide(ndm_i_extents *extents, uint32_t hole)
{
    node_t *nodes = extents->nodes;
    assert(hole < extents->node_count && is_free(&nodes[hole]));
    uint32_t used = nodes[hole].next;
    assert(used != NONE && !is_free(&nodes[used]));
    uint32_t next = nodes[used].next;

    nodes[used].offset = nodes[hole].offset;
    nodes[hole].offset += nodes[used].length;
    node_unlink(extents, hole);
    node_link(extents, hole, used);
    if (next != NONE && is_free(&nodes[next])) {
        bin_remove(extents, next);
        bin_remove(extents, hole);
        nodes[hole].length += nodes[next].length;
        node_drop(extents, next);
        bin_insert(extents, hole);
    }
    return hole;
}

uint64_t ndm_i_extents_trim(ndm_i_extents *extents)
{
    uint32_t last = extents->last;
    if (last != NONE && is_free(&extents->nodes[last])) {
        bin_remove(extents, last);
        extents->mark = extents->nodes[last].offset;
        node_drop(extents, last);
    }
    return extents->mark;
}

void ndm_i_extents_lower(ndm_i_extents *extents, uint64_t mark)
{
    const uint32_t last = extents->last;
    if (extents->mark <= mark)
        return;
    node_t *node = &extents->nodes[last];
    assert(is_free(node) && node->offset <= mark);
    bin_remove(extents, last);
    if (node->offset == mark) {
        node_drop(extents, last);
    } else {
        node->length = mark - node->offset;
        bin_insert(extents, last);
    }
    extents->mark = mark;
}
