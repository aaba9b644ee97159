/* The nodes of extents.h, for extents.c and its checker. What a node's links hold depends on what the node is:
 *
 *              used     free, in the trie        free, in a chain      spare
 *   prev,next  the neighbours by address, for all three                next: next spare
 *   child[0]   tag      subtree: next bit 0      newer member or head  -
 *   child[1]   -        subtree: next bit 1      -                     -
 *   up         USED     parent, or ROOT          MEMBER                SPARE
 *   same       -        newest of its chain      older member          -
 *
 * The trie of bin b holds lengths in [2^b, 2^(b+1)). All lengths below a node at depth d share their d bits after
 * the leading one; the node itself carries any one of them, so a node can be replaced by any leaf below it, and the
 * depth never exceeds b. Lengths occur once in a trie: further extents of the same length form a chain at the
 * trie node, the head. A chain is pushed and popped behind its head, so the space freed last is reused first and
 * the head, which every search passes, stays where it is.
 */
#ifndef NDM_EXTENTS_NODE_H
#define NDM_EXTENTS_NODE_H

#include "store/extents.h"

struct ndm_i_node {
    uint64_t offset;
    uint64_t length;
    uint32_t prev, next;
    uint32_t child[2];
    uint32_t up;
    uint32_t same;
};

_Static_assert(sizeof(struct ndm_i_node) == 40, "the promised metadata per slot");
_Static_assert(SIZE_MAX >= UINT64_MAX, "2^32 nodes fit");

/* Values of `up` that are no index. A node is free if `up` is ROOT or less. */
#define USED (UINT32_MAX - 1)
#define SPARE (UINT32_MAX - 2)
#define ROOT (UINT32_MAX - 3)
#define MEMBER (UINT32_MAX - 4)

#define NONE NDM_I_NONE

typedef ndm_i_extents extents_t;
typedef ndm_i_node node_t;

static inline bool is_free(const node_t *node)
{
    return node->up <= ROOT;
}

#endif
