/* Free space against a brute-force model, and the cases that a random walk seldom meets.
 *
 *   cc -std=c11 -O1 -g -fsanitize=address,undefined -Icsrc tests/core/test_extents.c csrc/store/extents?*.c csrc/store/extents.c -o test_extents
 *   ./test_extents [more seeds]
 *
 * Prints a line a group; exits 1 at the first thing that is wrong. */
#include "store/extents.h"
#include "store/extents_check.h"

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NONE NDM_I_NONE
#define CHECK(condition)                                                                   \
    do {                                                                                   \
        if (!(condition)) {                                                                \
            fprintf(stderr, "%s:%d: seed %llu, step %d: %s\n", __FILE__, __LINE__,         \
                    (unsigned long long)seed, step, #condition);                           \
            exit(1);                                                                       \
        }                                                                                  \
    } while (0)

static uint64_t seed, rng;
static int step;

static void random_start(uint64_t from)
{
    seed = from;
    rng = (from + 1) * 0x9E3779B97F4A7C15;
}

static uint64_t random_below(uint64_t bound)
{
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return (rng >> 8) % bound;
}

static uint32_t take(ndm_i_extents *e, uint64_t length, uint32_t tag)
{
    CHECK(ndm_i_extents_reserve(e));
    uint32_t extent = ndm_i_extents_take(e, ndm_i_extents_find(e, length), length, tag);
    CHECK(ndm_i_extents_check(e) == 0);
    return extent;
}

static void release(ndm_i_extents *e, uint32_t extent)
{
    ndm_i_extents_release(e, extent);
    CHECK(ndm_i_extents_check(e) == 0);
}

/* The whole structure as text: "u5 f3 u2". */
static const char *layout(const ndm_i_extents *e)
{
    static char text[4096];
    size_t at = 0;
    text[0] = 0;
    for (uint32_t i = ndm_i_extents_first(e); i != NONE; i = ndm_i_extents_next(e, i))
        at += (size_t)snprintf(text + at, sizeof text - at, "%s%c%llu", at ? " " : "",
                               ndm_i_extents_is_free(e, i) ? 'f' : 'u',
                               (unsigned long long)ndm_i_extents_length(e, i));
    return text;
}

#define CHECK_LAYOUT(e, expected) CHECK(strcmp(layout(e), expected) == 0)

/* Used extents of the given lengths, one behind the other. */
static void build(ndm_i_extents *e, uint32_t *extents, const uint64_t *lengths, int count)
{
    ndm_i_extents_init(e);
    for (int i = 0; i < count; i++)
        extents[i] = take(e, lengths[i], (uint32_t)i);
}

/* ---- random sequences, small spaces: one entry a unit ---- */

enum { SPACE = 4096 };

typedef struct {
    ndm_i_extents extents;
    uint32_t owner[SPACE]; /* tag of each unit below the mark; NONE: free */
    uint64_t mark;
    uint32_t live[SPACE]; /* names of the used extents */
    uint64_t live_count;
    uint32_t next_tag;
    uint64_t space;
} model_t;

static uint64_t run_length(const model_t *m, uint64_t from)
{
    uint64_t end = from;
    while (end < m->mark && m->owner[end] == m->owner[from])
        end++;
    return end - from;
}

static void model_compare(const model_t *m)
{
    const ndm_i_extents *e = &m->extents;
    uint64_t at = 0, free_count = 0, free_units = 0, largest = 0, used = 0;
    uint32_t previous = NONE;
    for (uint32_t i = ndm_i_extents_first(e); i != NONE; i = ndm_i_extents_next(e, i)) {
        CHECK(at < m->mark);
        uint64_t length = run_length(m, at);
        CHECK(ndm_i_extents_offset(e, i) == at && ndm_i_extents_length(e, i) == length);
        CHECK(ndm_i_extents_previous(e, i) == previous);
        CHECK(ndm_i_extents_is_free(e, i) == (m->owner[at] == NONE));
        CHECK(ndm_i_extents_tag(e, i) == m->owner[at]);
        if (m->owner[at] == NONE) {
            free_count++;
            free_units += length;
            largest = length > largest ? length : largest;
        } else {
            used++;
        }
        at += length;
        previous = i;
    }
    CHECK(at == m->mark && e->mark == m->mark && used == m->live_count);
    CHECK(ndm_i_extents_last(e) == previous);
    CHECK(e->free_count == free_count && e->free_units == free_units);
    CHECK(ndm_i_extents_largest(e) == largest);
    CHECK(ndm_i_extents_check(e) == 0);
}

static void model_take(model_t *m, uint64_t length)
{
    ndm_i_extents *e = &m->extents;
    ndm_i_place place = ndm_i_extents_find(e, length);
    uint64_t best = UINT64_MAX, tail = m->mark;
    for (uint64_t at = 0, run; at < m->mark; at += run) {
        run = run_length(m, at);
        if (m->owner[at] != NONE)
            continue;
        if (run >= length && run < best)
            best = run;
        if (at + run == m->mark)
            tail = at;
    }
    if (best != UINT64_MAX) {
        CHECK(place.hole != NONE);
        const uint64_t found = ndm_i_extents_length(e, place.hole);
        CHECK(place.near ? found / 2 <= best && found >= length : found == best);
        CHECK(ndm_i_extents_is_free(e, place.hole) && ndm_i_extents_offset(e, place.hole) == place.offset);
    } else {
        CHECK(place.offset == tail && (place.hole == NONE) == (tail == m->mark));
    }
    if (place.offset + length > m->space)
        return;
    CHECK(ndm_i_extents_reserve(e));
    uint32_t tag = m->next_tag++;
    uint32_t extent = ndm_i_extents_take(e, place, length, tag);
    CHECK(ndm_i_extents_offset(e, extent) == place.offset && ndm_i_extents_length(e, extent) == length);
    for (uint64_t at = place.offset; at < place.offset + length; at++) {
        CHECK(at >= m->mark || m->owner[at] == NONE);
        m->owner[at] = tag;
    }
    if (place.offset + length > m->mark)
        m->mark = place.offset + length;
    m->live[m->live_count++] = extent;
}

static void model_release(model_t *m)
{
    uint64_t pick = random_below(m->live_count);
    uint32_t extent = m->live[pick];
    uint64_t at = ndm_i_extents_offset(&m->extents, extent);
    for (uint64_t left = ndm_i_extents_length(&m->extents, extent); left > 0; left--)
        m->owner[at++] = NONE;
    ndm_i_extents_release(&m->extents, extent);
    m->live[pick] = m->live[--m->live_count];
}

/* Slide the first hole at or behind a random place, if a used extent follows it. */
static void model_slide(model_t *m)
{
    ndm_i_extents *e = &m->extents;
    uint64_t from = random_below(m->mark + 1);
    uint32_t hole = ndm_i_extents_first(e);
    while (hole != NONE && !(ndm_i_extents_is_free(e, hole) && ndm_i_extents_offset(e, hole) >= from))
        hole = ndm_i_extents_next(e, hole);
    if (hole == NONE || ndm_i_extents_next(e, hole) == NONE)
        return;
    uint32_t used = ndm_i_extents_next(e, hole);
    uint64_t offset = ndm_i_extents_offset(e, hole), gap = ndm_i_extents_length(e, hole);
    uint64_t length = ndm_i_extents_length(e, used);
    uint32_t tag = ndm_i_extents_tag(e, used);
    hole = ndm_i_extents_slide(e, hole);
    CHECK(ndm_i_extents_offset(e, used) == offset && ndm_i_extents_tag(e, used) == tag);
    CHECK(ndm_i_extents_previous(e, hole) == used && ndm_i_extents_offset(e, hole) == offset + length);
    for (uint64_t i = 0; i < gap + length; i++)
        m->owner[offset + i] = i < length ? tag : NONE;
}

static void model_retag(model_t *m)
{
    uint32_t extent = m->live[random_below(m->live_count)];
    uint64_t at = ndm_i_extents_offset(&m->extents, extent);
    ndm_i_extents_set_tag(&m->extents, extent, m->next_tag);
    for (uint64_t left = ndm_i_extents_length(&m->extents, extent); left > 0; left--)
        m->owner[at++] = m->next_tag;
    m->next_tag++;
}

/* Not after every step: asking moves the place where the next search starts. */
static void model_first_hole(model_t *m)
{
    uint32_t hole = ndm_i_extents_first_hole(&m->extents);
    uint64_t at = 0;
    while (at < m->mark && m->owner[at] != NONE)
        at++;
    CHECK((hole == NONE) == (at == m->mark));
    CHECK(hole == NONE || (ndm_i_extents_is_free(&m->extents, hole) && ndm_i_extents_offset(&m->extents, hole) == at));
}

static void model_trim(model_t *m)
{
    while (m->mark > 0 && m->owner[m->mark - 1] == NONE)
        m->mark--;
    CHECK(ndm_i_extents_trim(&m->extents) == m->mark);
}

/* Prefer one hole or another, or not any more; let the cursor stand at one. */
static void model_prefer(model_t *m)
{
    for (uint32_t i = ndm_i_extents_first(&m->extents); i != NONE; i = ndm_i_extents_next(&m->extents, i))
        if (ndm_i_extents_is_free(&m->extents, i) && random_below(3) == 0) {
            ndm_i_extents_prefer(&m->extents, i, random_below(2) == 0);
            m->extents.cursor = i;
        }
}

static void test_model(uint64_t number)
{
    static const uint64_t spaces[] = {8, 64, 300, 1024, SPACE};
    static model_t m;
    random_start(number);
    memset(&m, 0, sizeof m);
    m.space = spaces[number % 5];
    ndm_i_extents_init(&m.extents);
    model_first_hole(&m);
    model_compare(&m);
    uint64_t longest = 1 + random_below(m.space / 4), grows = 50;
    for (step = 0; step < 4000; step++) {
        if (step % 500 == 0)
            grows = 25 + random_below(60);
        uint64_t dice = random_below(100);
        if (dice < grows)
            model_take(&m, 1 + random_below(random_below(20) ? longest : m.space));
        else if (m.live_count == 0)
            continue;
        else if (dice < 94)
            model_release(&m);
        else if (dice < 97)
            model_slide(&m);
        else if (dice < 99)
            model_retag(&m);
        else
            model_trim(&m);
        if (random_below(3) == 0)
            model_first_hole(&m);
        if (number % 2 && random_below(5) == 0)
            model_prefer(&m);
        model_compare(&m);
    }
    while (m.live_count > 0) {
        model_release(&m);
        model_compare(&m);
    }
    CHECK(m.extents.free_count == (m.mark > 0));
    model_trim(&m);
    CHECK(m.extents.mark == 0 && ndm_i_extents_first(&m.extents) == NONE);
    ndm_i_extents_fini(&m.extents);
    step = 0;
}

/* ---- random sequences, lengths up to 2^48 ---- */

static uint64_t long_random(void)
{
    uint64_t bits = random_below(49), length = UINT64_C(1) << bits;
    switch (random_below(4)) {
    case 0:
        return length;
    case 1:
        return length > 1 ? length - 1 : 1;
    case 2:
        return length + random_below(3);
    default:
        return length + random_below(length);
    }
}

static void test_long(uint64_t number)
{
    enum { LIVE = 600 };
    struct {
        uint32_t extent;
        uint64_t offset, length;
    } live[LIVE];
    ndm_i_extents e;
    uint64_t count = 0;
    random_start(number);
    ndm_i_extents_init(&e);
    for (step = 0; step < 6000; step++) {
        if (count == LIVE || (count > 0 && random_below(100) < (step / 1000 % 2 ? 60 : 35))) {
            uint64_t pick = random_below(count);
            CHECK(ndm_i_extents_offset(&e, live[pick].extent) == live[pick].offset);
            CHECK(ndm_i_extents_length(&e, live[pick].extent) == live[pick].length);
            CHECK(!ndm_i_extents_is_free(&e, live[pick].extent));
            ndm_i_extents_release(&e, live[pick].extent);
            live[pick] = live[--count];
        } else {
            uint64_t length = long_random(), best = UINT64_MAX, largest = 0;
            for (uint32_t i = ndm_i_extents_first(&e); i != NONE; i = ndm_i_extents_next(&e, i)) {
                uint64_t hole = ndm_i_extents_is_free(&e, i) ? ndm_i_extents_length(&e, i) : 0;
                if (hole >= length && hole < best)
                    best = hole;
                largest = hole > largest ? hole : largest;
            }
            CHECK(ndm_i_extents_largest(&e) == largest);
            ndm_i_place place = ndm_i_extents_find(&e, length);
            if (best != UINT64_MAX)
                CHECK(place.hole != NONE && ndm_i_extents_length(&e, place.hole) == best);
            else
                CHECK(place.offset + length > e.mark);
            CHECK(ndm_i_extents_reserve(&e));
            live[count].extent = ndm_i_extents_take(&e, place, length, (uint32_t)step);
            live[count].offset = place.offset;
            live[count++].length = length;
        }
        CHECK(ndm_i_extents_check(&e) == 0);
    }
    ndm_i_extents_fini(&e);
    step = 0;
}

/* ---- single cases ---- */

static void test_join(void)
{
    static const uint64_t lengths[] = {5, 3, 7, 2, 4};
    uint32_t x[5];
    ndm_i_extents e;
    build(&e, x, lengths, 5);
    CHECK_LAYOUT(&e, "u5 u3 u7 u2 u4");
    release(&e, x[1]);
    CHECK_LAYOUT(&e, "u5 f3 u7 u2 u4");
    release(&e, x[3]);
    release(&e, x[2]); /* both sides */
    CHECK_LAYOUT(&e, "u5 f12 u4");
    release(&e, x[4]); /* the left side, at the mark */
    CHECK_LAYOUT(&e, "u5 f16");
    release(&e, x[0]); /* the right side, at 0 */
    CHECK_LAYOUT(&e, "f21");
    CHECK(e.mark == 21 && e.free_units == 21 && e.free_count == 1);
    CHECK(ndm_i_extents_trim(&e) == 0 && ndm_i_extents_trim(&e) == 0);
    CHECK_LAYOUT(&e, "");
    CHECK(ndm_i_extents_check(&e) == 0 && ndm_i_extents_largest(&e) == 0);
    take(&e, 6, 9);
    CHECK_LAYOUT(&e, "u6");
    ndm_i_extents_fini(&e);
    CHECK(e.nodes == NULL && ndm_i_extents_check(&e) == 0);
}

static void test_split_and_mark(void)
{
    static const uint64_t lengths[] = {10, 1, 20, 1, 6};
    uint32_t x[5];
    ndm_i_extents e;
    build(&e, x, lengths, 5);
    release(&e, x[0]);
    release(&e, x[2]);
    uint32_t split = take(&e, 11, 70); /* too long for 10 */
    CHECK_LAYOUT(&e, "f10 u1 u11 f9 u1 u6");
    CHECK(ndm_i_extents_offset(&e, split) == 11 && ndm_i_extents_tag(&e, split) == 70);
    take(&e, 9, 71); /* exactly the rest */
    CHECK_LAYOUT(&e, "f10 u1 u11 u9 u1 u6");
    release(&e, x[4]);
    CHECK(e.mark == 38); /* does not fall */
    ndm_i_place place = ndm_i_extents_find(&e, 30);
    CHECK(place.offset == 32 && place.hole != NONE);
    uint32_t tail = take(&e, 30, 72); /* the short hole at the mark is part of it */
    CHECK_LAYOUT(&e, "f10 u1 u11 u9 u1 u30");
    CHECK(e.mark == 62 && ndm_i_extents_tag(&e, tail) == 72);
    place = ndm_i_extents_find(&e, 11);
    CHECK(place.offset == 62 && place.hole == NONE);
    release(&e, tail);
    take(&e, 4, 73); /* the shorter hole, though the one at the mark is free too */
    CHECK_LAYOUT(&e, "u4 f6 u1 u11 u9 u1 f30");
    CHECK(ndm_i_extents_trim(&e) == 32 && ndm_i_extents_check(&e) == 0);
    CHECK_LAYOUT(&e, "u4 f6 u1 u11 u9 u1");
    CHECK(ndm_i_extents_trim(&e) == 32);
    ndm_i_extents_fini(&e);
}

static void test_slide(void)
{
    static const uint64_t lengths[] = {5, 3, 7, 2, 4};
    uint32_t x[5];
    ndm_i_extents e;
    build(&e, x, lengths, 5);
    release(&e, x[0]);
    uint32_t hole = ndm_i_extents_slide(&e, ndm_i_extents_first(&e)); /* from the front */
    CHECK_LAYOUT(&e, "u3 f5 u7 u2 u4");
    CHECK(ndm_i_extents_check(&e) == 0 && ndm_i_extents_first(&e) == x[1]);
    release(&e, x[3]);
    CHECK_LAYOUT(&e, "u3 f5 u7 f2 u4");
    hole = ndm_i_extents_slide(&e, hole); /* joins the hole behind */
    CHECK_LAYOUT(&e, "u3 u7 f7 u4");
    CHECK(ndm_i_extents_check(&e) == 0 && ndm_i_extents_offset(&e, x[2]) == 3);
    hole = ndm_i_extents_slide(&e, hole); /* to the mark */
    CHECK_LAYOUT(&e, "u3 u7 u4 f7");
    CHECK(ndm_i_extents_check(&e) == 0 && e.mark == 21);
    CHECK(ndm_i_extents_next(&e, hole) == NONE && ndm_i_extents_tag(&e, x[4]) == 4);
    CHECK(ndm_i_extents_trim(&e) == 14 && ndm_i_extents_check(&e) == 0);
    ndm_i_extents_fini(&e);
}

/* Holes of one length, taken out of their chain from each position, and reused in the order last in, first out. */
static void test_same_length(void)
{
    enum { HOLES = 7 };
    for (int out = 0; out < HOLES; out++) {
        uint32_t x[2 * HOLES + 1];
        ndm_i_extents e;
        ndm_i_extents_init(&e);
        for (int i = 0; i <= 2 * HOLES; i++)
            x[i] = take(&e, i % 2 ? 24 : 100, (uint32_t)i);
        for (int i = 0; i < HOLES; i++)
            release(&e, x[2 * i + 1]);
        uint64_t newest = 100 + 124 * (HOLES - 1);
        CHECK(ndm_i_extents_find(&e, 24).offset == newest && ndm_i_extents_find(&e, 17).offset == newest);
        release(&e, x[2 * out]); /* a wall: takes one or two out of the chain */
        CHECK(e.free_count == (out == 0 ? HOLES : HOLES - 1));
        CHECK(ndm_i_extents_largest(&e) == (out == 0 ? 124 : 148));
        for (int i = 0; i < HOLES; i++)
            take(&e, 24, 1);
        take(&e, 100, 1);
        CHECK(e.free_count <= 1 && e.mark == 100 + 124 * HOLES);
        ndm_i_extents_fini(&e);
    }
}

/* Every order in which a full bin can be emptied by its own size: exact fits must be found among all others. */
static void test_dense_bin(void)
{
    enum { FROM = 64, TO = 128 };
    for (int round = 0; round < 40; round++) {
        uint32_t hole[TO], left[TO];
        bool gone[TO] = {false};
        ndm_i_extents e;
        random_start((uint64_t)round);
        ndm_i_extents_init(&e);
        int count = 0;
        for (int length = FROM; length < TO; length++) {
            hole[length] = take(&e, (uint64_t)length, 0);
            take(&e, 1, 0);
            left[count++] = (uint32_t)length;
        }
        for (; count > 0; left[step] = left[--count]) {
            step = (int)random_below((uint64_t)count);
            release(&e, hole[left[step]]);
        }
        for (count = TO - FROM; count > 0; count--) {
            uint32_t want = FROM + (uint32_t)random_below(TO - FROM), expect = want;
            while (expect < TO && gone[expect])
                expect++;
            ndm_i_place place = ndm_i_extents_find(&e, want);
            CHECK((place.hole == NONE) == (expect == TO));
            if (expect == TO)
                continue;
            CHECK(ndm_i_extents_length(&e, place.hole) == expect);
            gone[expect] = true;
            take(&e, expect, 0);
        }
        step = 0;
        ndm_i_extents_fini(&e);
    }
}

static void test_huge_bins(void)
{
    uint32_t x[62];
    ndm_i_extents e;
    ndm_i_extents_init(&e);
    for (unsigned bit = 0; bit < 62; bit++) {
        x[bit] = take(&e, UINT64_C(1) << bit, bit);
        if (bit < 61)
            take(&e, 1, NONE - 1);
    }
    for (unsigned bit = 0; bit < 62; bit++)
        release(&e, x[bit]);
    CHECK(e.bins.map == (UINT64_C(1) << 62) - 1);
    for (unsigned bit = 0; bit < 62; bit++) {
        uint64_t length = UINT64_C(1) << bit;
        CHECK(ndm_i_extents_length(&e, ndm_i_extents_find(&e, length).hole) == length);
        if (bit < 61)
            CHECK(ndm_i_extents_length(&e, ndm_i_extents_find(&e, length + 1).hole) == 2 * length);
    }
    CHECK(ndm_i_extents_largest(&e) == UINT64_C(1) << 61);
    ndm_i_place tail = ndm_i_extents_find(&e, (UINT64_C(1) << 61) + 1);
    CHECK(tail.offset + (UINT64_C(1) << 61) == e.mark);
    ndm_i_extents_fini(&e);

    /* The topmost bin: one hole of 2^63 units. */
    ndm_i_extents_init(&e);
    uint32_t all = take(&e, UINT64_C(1) << 63, 5);
    release(&e, all);
    CHECK(ndm_i_extents_find(&e, UINT64_C(1) << 63).hole != NONE && ndm_i_extents_largest(&e) == UINT64_C(1) << 63);
    take(&e, 1, 6);
    CHECK(ndm_i_extents_largest(&e) == (UINT64_C(1) << 63) - 1);
    ndm_i_extents_fini(&e);
}

/* Names and tags outlast the growth of the node array; released nodes are used again. */
static void test_growth(void)
{
    enum { MANY = 3000 };
    static uint32_t x[MANY];
    ndm_i_extents e;
    ndm_i_extents_init(&e);
    for (int round = 0; round < 3; round++) {
        for (uint32_t i = 0; i < MANY; i++) {
            CHECK(ndm_i_extents_reserve(&e));
            x[i] = ndm_i_extents_take(&e, ndm_i_extents_find(&e, 1 + i % 9), 1 + i % 9, i);
        }
        CHECK(ndm_i_extents_check(&e) == 0);
        for (uint32_t i = 0; i < MANY; i++)
            CHECK(ndm_i_extents_tag(&e, x[i]) == i && ndm_i_extents_length(&e, x[i]) == 1 + i % 9);
        for (uint32_t i = 0; i < MANY; i++)
            ndm_i_extents_release(&e, x[i * 7 % MANY]);
        CHECK(ndm_i_extents_check(&e) == 0 && e.free_count == 1);
        CHECK(e.node_count <= MANY + 1);
    }
    ndm_i_extents_fini(&e);
}

/* ---- damage ---- */

enum { NODE_WORDS = 10, WORD_CHILD0 = 6, WORD_CHILD1 = 7, WORD_UP = 8, WORD_SAME = 9 };

/* Holes in tries and chains, used extents, spare nodes. */
static void build_mixture(ndm_i_extents *e)
{
    uint32_t x[60];
    ndm_i_extents_init(e);
    for (uint32_t i = 0; i < 60; i++)
        x[i] = take(e, 1 + (i * 7) % 23, i);
    for (uint32_t i = 1; i < 50; i += 2)
        release(e, x[i]);
    release(e, x[20]);
    release(e, x[30]);
    uint32_t holes = 0;
    for (uint32_t i = ndm_i_extents_first(e); i != NONE; i = ndm_i_extents_next(e, i))
        if (ndm_i_extents_is_free(e, i) && holes++ % 3 == 0)
            ndm_i_extents_prefer(e, i, true);
    CHECK(e->near.map != 0);
    CHECK(e->spare_count > 0 && e->free_count > 20);
}

/* Does the checker look at this word? Not at tags, nor at links that a node of its kind does not use. */
static bool word_matters(const uint32_t *node, uint32_t word)
{
    enum { SPARE = UINT32_MAX - 2, USED = UINT32_MAX - 1, MEMBER = UINT32_MAX - 4, WORD_NEXT = 5 };
    if (node[WORD_UP] == (uint32_t)SPARE)
        return word == WORD_NEXT || word == WORD_UP;
    if (node[WORD_UP] == (uint32_t)USED)
        return word < WORD_CHILD0 || word == WORD_UP;
    return node[WORD_UP] != (uint32_t)MEMBER || word != WORD_CHILD1;
}

static uint32_t damaged(uint32_t value, int how)
{
    static const uint32_t special[] = {NONE, NONE - 1, NONE - 2, NONE - 3, NONE - 4, NONE - 5, 0, 1, 2, 7, 1000000};
    return how < 32 ? value ^ UINT32_C(1) << how : how < 43 ? special[how - 32] : (uint32_t)random_below(70);
}

static void test_damage(void)
{
    ndm_i_extents e;
    uint64_t tried = 0;
    random_start(1);
    build_mixture(&e);
    uint32_t *words = (uint32_t *)(void *)e.nodes;
    for (uint32_t i = 0; i < e.node_count * NODE_WORDS; i++) {
        if (!word_matters(&words[i / NODE_WORDS * NODE_WORDS], i % NODE_WORDS))
            continue;
        uint32_t sound = words[i];
        for (int how = 0; how < 50; how++) {
            words[i] = damaged(sound, how);
            step = (int)i;
            CHECK((ndm_i_extents_check(&e) == 0) == (words[i] == sound));
            tried++;
        }
        words[i] = sound;
    }
    /* The fields of the head: everything but the pointer, the room, `lowest`, which may be any early extent, and
     * `cursor`, which may be any. */
    uint32_t *head = (uint32_t *)(void *)&e;
    for (size_t i = offsetof(ndm_i_extents, node_count) / 4; i < sizeof e / 4; i++) {
        if (i == offsetof(ndm_i_extents, node_room) / 4 || i == offsetof(ndm_i_extents, lowest) / 4 ||
            (i >= offsetof(ndm_i_extents, cursor) / 4 && i < offsetof(ndm_i_extents, bins) / 4)) /* padding follows it */
            continue;
        uint32_t sound = head[i];
        for (int how = 0; how < 50; how++) {
            head[i] = damaged(sound, how);
            step = (int)i;
            CHECK((ndm_i_extents_check(&e) == 0) == (head[i] == sound));
            tried++;
        }
        head[i] = sound;
    }
    step = 0;
    CHECK(ndm_i_extents_check(&e) == 0 && tried > 10000);
    e.lowest = e.last; /* holes lie before it */
    CHECK(ndm_i_extents_check(&e) > 0);
    ndm_i_extents_fini(&e);

    ndm_i_extents_init(&e); /* no hole, so no hole lies before a `lowest` that is no extent */
    take(&e, 5, 0);
    e.lowest = 1000000;
    CHECK(ndm_i_extents_check(&e) > 0);
    ndm_i_extents_fini(&e);
}

/* Two free neighbours, each in its bin and counted: only their being neighbours is wrong. */
static void test_free_neighbours(void)
{
    static const uint64_t lengths[] = {5, 3, 7};
    uint32_t x[3];
    ndm_i_extents e;
    build(&e, x, lengths, 3);
    release(&e, x[0]);
    uint32_t *node = (uint32_t *)(void *)e.nodes + x[1] * NODE_WORDS;
    node[WORD_CHILD0] = node[WORD_CHILD1] = node[WORD_SAME] = NONE;
    node[WORD_UP] = NONE - 3; /* ROOT */
    e.bins.roots[1] = x[1];
    e.bins.map |= 2;
    e.free_count++;
    e.free_units += 3;
    CHECK(ndm_i_extents_check(&e) == 1);
    ndm_i_extents_fini(&e);
}

/* Many words at once: the checker has to end, and to stay inside the array. */
static void test_wreckage(void)
{
    for (int round = 0; round < 3000; round++) {
        ndm_i_extents e;
        random_start((uint64_t)round);
        build_mixture(&e);
        uint32_t *words = (uint32_t *)(void *)e.nodes;
        for (uint64_t hits = 1 + random_below(40); hits > 0; hits--) {
            uint64_t at = random_below(e.node_count) * NODE_WORDS + 4 + random_below(6);
            words[at] = damaged(words[at], (int)random_below(50));
        }
        (void)ndm_i_extents_check(&e);
        ndm_i_extents_fini(&e);
    }
}

int main(int argc, char **argv)
{
    uint64_t seeds = 20 + (argc > 1 ? strtoull(argv[1], NULL, 10) : 0);
    static const struct {
        const char *name;
        void (*run)(void);
    } cases[] = {
        {"a released extent joins its free neighbours", test_join},
        {"a hole is split, a short one at the mark extended", test_split_and_mark},
        {"a hole slides over the used extent behind it", test_slide},
        {"holes of one length come out from any position, newest first", test_same_length},
        {"a dense bin always gives the best fit", test_dense_bin},
        {"bins up to 2^63 units", test_huge_bins},
        {"names outlast growth, nodes are used again", test_growth},
        {"any damaged word is found", test_damage},
        {"free neighbours are found", test_free_neighbours},
        {"the checker ends on wreckage", test_wreckage},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        cases[i].run();
        printf("ok  %s\n", cases[i].name);
    }
    for (uint64_t number = 0; number < seeds; number++)
        test_model(number);
    printf("ok  %llu random sequences agree with the unit map\n", (unsigned long long)seeds);
    for (uint64_t number = 0; number < seeds; number++)
        test_long(number);
    printf("ok  %llu random sequences with lengths up to 2^49\n", (unsigned long long)seeds);
    return 0;
}
