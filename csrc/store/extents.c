/* Free space, see extents.h; what the nodes hold, see extents_node.h. */
#include "store/extents_bins.h"

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
    const uint32_t beside = extents->nodes[index].prev != NONE ? extents->nodes[index].prev : extents->nodes[index].next;
    if (extents->lowest == index)
        extents->lowest = beside;
    if (extents->cursor == index)
        extents->cursor = beside;
    node_unlink(extents, index);
    extents->nodes[index].up = SPARE;
    extents->nodes[index].next = extents->spare;
    extents->spare = index;
    extents->spare_count++;
}

/* ---- the interface ---- */

void ndm_i_extents_init(ndm_i_extents *extents)
{
    memset(extents, 0, sizeof *extents);
    extents->spare = extents->first = extents->last = extents->lowest = extents->cursor = NONE;
    for (int bin = 0; bin < 64; bin++)
        extents->bins.roots[bin] = extents->near.roots[bin] = NONE;
}

void ndm_i_extents_fini(ndm_i_extents *extents)
{
    free(extents->nodes);
    ndm_i_extents_init(extents);
}

/* One that is near is as good as one of half its length. */
static __attribute__((noinline)) ndm_i_place near_or(const extents_t *extents, uint64_t length, uint32_t best)
{
    const node_t *nodes = extents->nodes;
    const uint32_t near = bins_best(nodes, &extents->near, length);
    if (near != NONE && (best == NONE || nodes[near].length / 2 <= nodes[best].length))
        return (ndm_i_place){nodes[near].offset, near, true};
    if (best == NONE && is_free(&nodes[extents->last]))
        best = extents->last;
    return (ndm_i_place){best != NONE ? nodes[best].offset : extents->mark, best, false};
}

ndm_i_place ndm_i_extents_find(const ndm_i_extents *extents, uint64_t length)
{
    const node_t *nodes = extents->nodes;
    assert(length > 0);
    uint32_t best = bins_best(nodes, &extents->bins, length);
    if (extents->near.map != 0)
        return near_or(extents, length, best);
    if (best == NONE && extents->last != NONE && is_free(&nodes[extents->last]))
        best = extents->last;
    return (ndm_i_place){best != NONE ? nodes[best].offset : extents->mark, best, false};
}

ndm_i_place ndm_i_extents_find_in(const ndm_i_extents *extents, bool near, uint64_t length)
{
    const uint32_t best = bins_best(extents->nodes, near ? &extents->near : &extents->bins, length);
    return (ndm_i_place){best != NONE ? extents->nodes[best].offset : extents->mark, best, near};
}

void ndm_i_extents_prefer(ndm_i_extents *extents, uint32_t extent, bool near)
{
    assert(extent < extents->node_count && is_free(&extents->nodes[extent]));
    bin_remove(extents, extent);
    bin_insert(extents, near ? &extents->near : &extents->bins, extent);
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
            bin_insert(extents, place.near ? &extents->near : &extents->bins, rest);
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
    bin_insert(extents, &extents->bins, extent);
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

uint32_t ndm_i_extents_longest(const ndm_i_extents *extents)
{
    const uint32_t far = bins_longest(extents->nodes, &extents->bins);
    const uint32_t near = bins_longest(extents->nodes, &extents->near);
    if (far == NONE || near == NONE)
        return far == NONE ? near : far;
    return extents->nodes[near].length > extents->nodes[far].length ? near : far;
}

uint64_t ndm_i_extents_largest(const ndm_i_extents *extents)
{
    const uint32_t longest = ndm_i_extents_longest(extents);
    return longest == NONE ? 0 : extents->nodes[longest].length;
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
        bin_insert(extents, &extents->bins, hole);
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
        bin_insert(extents, &extents->bins, last);
    }
    extents->mark = mark;
}
