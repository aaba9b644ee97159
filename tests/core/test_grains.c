/* The state table of grains: states and marks, room, what is adopted, questions at the edges, and a checker that finds what is
 * planted. */
#include "check.h"
#include "store/grains.h"

#define GRAIN NDM_I_GRAIN

enum { COUNT = 10 };

static void start(ndm_i_grains *grains)
{
    *grains = (ndm_i_grains){0};
    CHECK(ndm_i_grains_reserve(grains, COUNT) && grains->room == COUNT);
    CHECK(ndm_i_grains_check(grains, COUNT * GRAIN) == 0 && ndm_i_grains_check(grains, 0) == 0);
}

static void stop(ndm_i_grains *grains)
{
    ndm_i_grains_fini(grains);
    CHECK(!grains->states && !grains->marks && grains->room == 0);
}

static void test_states(void)
{
    ndm_i_grains grains;
    start(&grains);
    for (uint64_t grain = 0; grain < COUNT; grain++)
        CHECK(ndm_i_grain_state(&grains, grain) == NDM_I_EMPTY);
    for (uint8_t state = NDM_I_EMPTY; state <= NDM_I_DROPPED; state++) {
        ndm_i_grain_set_state(&grains, state, state);
        CHECK(ndm_i_grains_check(&grains, COUNT * GRAIN) == 0);
    }
    for (uint64_t grain = 0; grain < COUNT; grain++)
        CHECK(ndm_i_grain_state(&grains, grain) == (grain <= NDM_I_DROPPED ? grain : NDM_I_EMPTY));
    stop(&grains);
}

static void test_marks(void)
{
    static const uint8_t marks[] = {NDM_I_QUEUED, NDM_I_RECENT, NDM_I_WIDE};
    ndm_i_grains grains;
    start(&grains);
    for (int i = 0; i < 3; i++) {
        CHECK(!ndm_i_grain_is(&grains, 3, marks[i]));
        ndm_i_grain_mark(&grains, 3, marks[i]);
        ndm_i_grain_mark(&grains, 3, marks[i]);
        for (int k = 0; k < 3; k++)
            CHECK(ndm_i_grain_is(&grains, 3, marks[k]) == (k <= i));
    }
    CHECK(!ndm_i_grain_is(&grains, 2, UINT8_MAX) && !ndm_i_grain_is(&grains, 4, UINT8_MAX));
    ndm_i_grain_unmark(&grains, 3, NDM_I_RECENT);
    CHECK(!ndm_i_grain_is(&grains, 3, NDM_I_RECENT) && ndm_i_grain_is(&grains, 3, NDM_I_QUEUED));
    ndm_i_grain_unmark(&grains, 3, UINT8_MAX);
    CHECK(!ndm_i_grain_is(&grains, 3, UINT8_MAX) && ndm_i_grain_state(&grains, 3) == NDM_I_EMPTY);
    CHECK(!ndm_i_grain_is(&grains, COUNT, UINT8_MAX) && !ndm_i_grain_is(&grains, UINT64_MAX, UINT8_MAX));
    stop(&grains);
}

/* More room leaves states and marks as they are; less is not given back. */
static void test_reserve(void)
{
    ndm_i_grains grains;
    start(&grains);
    for (uint64_t grain = 0; grain < COUNT; grain++) {
        ndm_i_grain_set_state(&grains, grain, (uint8_t)(grain % 6));
        ndm_i_grain_mark(&grains, grain, (uint8_t)(grain % 8));
    }
    const _Atomic uint8_t *before = grains.states;
    CHECK(ndm_i_grains_reserve(&grains, 0) && ndm_i_grains_reserve(&grains, COUNT));
    CHECK(grains.states == before && grains.room == COUNT);
    for (uint64_t room = COUNT + 1; room < 100000; room *= 7) {
        CHECK(ndm_i_grains_reserve(&grains, room) && grains.room == room);
        for (uint64_t grain = 0; grain < room; grain++) {
            CHECK(ndm_i_grain_state(&grains, grain) == (grain < COUNT ? grain % 6 : NDM_I_EMPTY));
            for (int bit = 0; bit < 3; bit++)
                CHECK(ndm_i_grain_is(&grains, grain, (uint8_t)(1 << bit)) == (grain < COUNT && (grain >> bit & 1)));
        }
    }
    stop(&grains);
}

static void test_adopt(void)
{
    ndm_i_grains grains;
    start(&grains);
    ndm_i_grains_adopt(&grains, 0, 1);
    ndm_i_grains_adopt(&grains, 2 * GRAIN - 1, 1);         /* the last byte of grain 1 */
    ndm_i_grains_adopt(&grains, 4 * GRAIN, GRAIN);         /* all of grain 4, nothing of 5 */
    ndm_i_grains_adopt(&grains, 7 * GRAIN - 1, GRAIN + 2); /* a byte each of 6 and 8 */
    ndm_i_grains_adopt(&grains, 3 * GRAIN, 0);             /* nothing at all */
    static const uint8_t adopted[] = {1, 1, 0, 0, 1, 0, 1, 1, 1, 0};
    for (uint64_t grain = 0; grain < COUNT; grain++)
        CHECK(ndm_i_grain_state(&grains, grain) == (adopted[grain] ? NDM_I_PARTIAL : NDM_I_EMPTY));
    ndm_i_grain_set_state(&grains, 5, NDM_I_READY);
    ndm_i_grains_adopt_rest(&grains, 8 * GRAIN + 1); /* the file ends in grain 8 */
    for (uint64_t grain = 0; grain < COUNT; grain++)
        CHECK(ndm_i_grain_state(&grains, grain) == (adopted[grain] ? NDM_I_PARTIAL
                                                    : grain == 5   ? NDM_I_READY
                                                    : grain < 9    ? NDM_I_HOLE
                                                                   : NDM_I_EMPTY));
    CHECK(ndm_i_grains_check(&grains, 8 * GRAIN + 1) == 0);
    stop(&grains);
}

static void test_ends(void)
{
    const struct {
        uint64_t end, grains;
    } cases[] = {{0, 0}, {1, 1}, {GRAIN - 1, 1}, {GRAIN, 1}, {GRAIN + 1, 2}, {(uint64_t)1 << 47, (uint64_t)1 << 28}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        CHECK(ndm_i_grains_end(cases[i].end) == cases[i].grains);
}

/* Grains 2 and 3 are ready, 1 was dropped, 4 is begun. */
static void test_questions(void)
{
    ndm_i_grains grains;
    start(&grains);
    ndm_i_grain_set_state(&grains, 1, NDM_I_DROPPED);
    ndm_i_grain_set_state(&grains, 2, NDM_I_READY);
    ndm_i_grain_set_state(&grains, 3, NDM_I_READY);
    ndm_i_grain_set_state(&grains, 4, NDM_I_BEGUN);
    const struct {
        uint64_t start, end;
        bool are_ready, has_dropped, has_begun;
    } cases[] = {
        {2 * GRAIN, 4 * GRAIN, true, false, false},
        {2 * GRAIN, 2 * GRAIN + 1, true, false, false},
        {4 * GRAIN - 1, 4 * GRAIN, true, false, false},
        {4 * GRAIN - 1, 4 * GRAIN + 1, false, false, true},
        {4 * GRAIN, 4 * GRAIN + 1, false, false, true},
        {2 * GRAIN - 1, 2 * GRAIN, false, true, false},
        {2 * GRAIN - 1, 2 * GRAIN + 1, false, true, false},
        {0, COUNT * GRAIN, false, true, true},
        {0, GRAIN, false, false, false},
        {0, GRAIN + 1, false, true, false},
        {2 * GRAIN, 2 * GRAIN, true, false, false}, /* no bytes: nothing that is not ready, nothing at all */
        {GRAIN, GRAIN, true, false, false},
        {COUNT * GRAIN, COUNT * GRAIN, true, false, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        CHECK(ndm_i_grains_are_ready(&grains, cases[i].start, cases[i].end) == cases[i].are_ready);
        CHECK(ndm_i_grains_have(&grains, cases[i].start, cases[i].end, NDM_I_DROPPED) == cases[i].has_dropped);
        CHECK(ndm_i_grains_have(&grains, cases[i].start, cases[i].end, NDM_I_BEGUN) == cases[i].has_begun);
    }
    stop(&grains);
}

static void test_damage(void)
{
    ndm_i_grains grains;
    const uint64_t capacity = 8 * GRAIN + 1; /* grain 8 is the last */
    start(&grains);
    for (uint64_t grain = 0; grain < COUNT; grain += 4) {
        for (unsigned state = 0; state <= UINT8_MAX; state++) {
            atomic_store(&grains.states[grain], (uint8_t)state);
            CHECK(ndm_i_grains_check(&grains, capacity) == (state > NDM_I_DROPPED));
        }
        atomic_store(&grains.states[grain], NDM_I_EMPTY);
        for (unsigned marks = 0; marks <= UINT8_MAX; marks++) {
            atomic_store(&grains.marks[grain], (uint8_t)marks);
            CHECK(ndm_i_grains_check(&grains, capacity) == (marks > 7));
        }
        atomic_store(&grains.marks[grain], 0);
    }
    ndm_i_grain_set_state(&grains, 9, NDM_I_HOLE); /* past the end of the file */
    CHECK(ndm_i_grains_check(&grains, capacity) == 1 && ndm_i_grains_check(&grains, COUNT * GRAIN) == 0);
    ndm_i_grain_set_state(&grains, 9, NDM_I_EMPTY);
    ndm_i_grain_mark(&grains, 9, NDM_I_RECENT);
    CHECK(ndm_i_grains_check(&grains, capacity) == 1 && ndm_i_grains_check(&grains, COUNT * GRAIN) == 0);
    ndm_i_grain_unmark(&grains, 9, NDM_I_RECENT);
    CHECK(ndm_i_grains_check(&grains, COUNT * GRAIN + 1) == 1); /* more file than table */
    CHECK(ndm_i_grains_check(&grains, capacity) == 0);
    stop(&grains);
}

/* Grains 4 to 7 share a huge folio; 8 and 9 may, with what lies past the end. */
static void test_wide(void)
{
    ndm_i_grains grains;
    start(&grains);
    for (uint64_t grain = 0; grain < COUNT; grain++)
        ndm_i_grain_set_state(&grains, grain, grain % 2 ? NDM_I_READY : NDM_I_DROPPED);
    for (uint64_t grain = 5; grain < 8; grain++) /* one of them lost its mark */
        ndm_i_grain_mark(&grains, grain, NDM_I_WIDE);
    ndm_i_grain_mark(&grains, 9, NDM_I_WIDE);
    for (uint64_t grain = 0; grain < COUNT; grain++)
        CHECK(ndm_i_grains_are_wide(&grains, grain) == (grain >= 4));
    static const uint64_t ranges[][4] = {{0, 3, 0, 3}, {1, 5, 1, 8}, {5, 6, 4, 8}, {7, 9, 4, COUNT}, {3, 10, 3, COUNT}, {6, 6, 6, 6}};
    for (unsigned i = 0; i < sizeof ranges / sizeof *ranges; i++) {
        uint64_t first = ranges[i][0], last = ranges[i][1];
        ndm_i_grains_widen(&grains, &first, &last, COUNT);
        CHECK(first == ranges[i][2] && last == ranges[i][3]);
    }
    ndm_i_grains_doubt(&grains, 6, 7);
    for (uint64_t grain = 0; grain < COUNT; grain++)
        CHECK(ndm_i_grain_state(&grains, grain) ==
              ((grain >= 4 && grain < 8) ? NDM_I_PARTIAL : grain % 2 ? NDM_I_READY : NDM_I_DROPPED));
    ndm_i_grains_doubt(&grains, 0, 4); /* others' blocks are nothing to them */
    CHECK(ndm_i_grain_state(&grains, 9) == NDM_I_READY);
    stop(&grains);
    start(&grains); /* what was adopted may have folios of any size */
    ndm_i_grains_adopt(&grains, GRAIN, GRAIN);
    ndm_i_grains_adopt_rest(&grains, 2 * GRAIN);
    CHECK(!ndm_i_grains_are_wide(&grains, 1));
    grains.huge_folios = true;
    ndm_i_grains_adopt(&grains, GRAIN, GRAIN);
    CHECK(ndm_i_grains_are_wide(&grains, 0) && ndm_i_grain_is(&grains, 1, NDM_I_WIDE));
    ndm_i_grains_adopt_rest(&grains, 2 * GRAIN);
    CHECK(ndm_i_grain_is(&grains, 0, NDM_I_WIDE) && !ndm_i_grains_are_wide(&grains, 4));
    stop(&grains);
}

/* Large values are counted in each 2 MiB that they touch, small ones nowhere. */
static void test_large(void)
{
    ndm_i_grains grains;
    start(&grains);
    ndm_i_grains_count_large(&grains, 0, NDM_I_LARGE - 1, 1);
    CHECK(grains.large_values == 0 && !ndm_i_grains_hold_large(&grains, 0, 1));
    ndm_i_grains_count_large(&grains, NDM_I_HUGE - 1, NDM_I_HUGE + 1, 1);
    CHECK(grains.large_values == 1 && grains.large[0] == 1 && grains.large[1] == 1 && grains.large[2] == 0);
    CHECK(ndm_i_grains_hold_large(&grains, 0, 1) && !ndm_i_grains_hold_large(&grains, 2 * NDM_I_HUGE, 2 * NDM_I_HUGE + 1));
    CHECK(ndm_i_grains_hold_large(&grains, 2 * NDM_I_HUGE - 1, 2 * NDM_I_HUGE + 1));
    ndm_i_grains_count_large(&grains, NDM_I_HUGE - 1, NDM_I_HUGE + 1, -1);
    CHECK(grains.large_values == 0 && ndm_i_grains_check(&grains, COUNT * GRAIN) == 0);
    stop(&grains);
}

int main(void)
{
    test_states();
    test_marks();
    test_reserve();
    test_adopt();
    test_ends();
    test_questions();
    test_damage();
    test_wide();
    test_large();
    puts("grains: states, marks, reserve, adopt, ends, questions, damage, wide, large: ok");
    return 0;
}
