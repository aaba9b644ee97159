/* The order and the windows in which the disk is asked for many places of a file. */
#include "store/ahead.h"
#include "store/grains.h"

#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                       \
    do {                                                                       \
        if (!(condition)) {                                                    \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);    \
            abort();                                                           \
        }                                                                      \
    } while (0)

static void test_places_are_put_in_order_and_keep_their_tags(void)
{
    enum { COUNT = 1000 };
    static ndm_i_wanted wanted[COUNT];
    for (uint64_t i = 0; i < COUNT; i++)
        wanted[i] = (ndm_i_wanted){.offset = i * 7919 % COUNT * 64, .size = 1, .tag = i};
    ndm_i_ahead_sort(wanted, COUNT);
    for (uint64_t i = 0; i < COUNT; i++)
        CHECK(wanted[i].offset == i * 64 && wanted[i].tag * 7919 % COUNT == i);
    ndm_i_ahead_sort(wanted, 0);
    ndm_i_ahead_sort(NULL, 0);
}

static void test_a_window_holds_as_many_grains_as_it_may(void)
{
    const uint64_t grain = NDM_I_GRAIN;
    const ndm_i_wanted wanted[] = {
        {.offset = 0, .size = 1},         {.offset = grain - 1, .size = 1}, {.offset = grain - 1, .size = 2}, /* into the next */
        {.offset = grain + 5, .size = 1}, {.offset = 9 * grain, .size = 1}, {.offset = 20 * grain, .size = 5 * grain},
        {.offset = 25 * grain, .size = 1}};
    uint64_t held;
    CHECK(ndm_i_ahead_window(wanted, 7, 0, 1, &held) == 2 && held == 1);
    CHECK(ndm_i_ahead_window(wanted, 7, 0, 2, &held) == 4 && held == 2);
    CHECK(ndm_i_ahead_window(wanted, 7, 0, 3, &held) == 5 && held == 3);
    CHECK(ndm_i_ahead_window(wanted, 7, 0, 7, &held) == 5 && held == 3);
    CHECK(ndm_i_ahead_window(wanted, 7, 0, 8, &held) == 6 && held == 8);
    CHECK(ndm_i_ahead_window(wanted, 7, 0, UINT64_MAX, &held) == 7 && held == 9);
    CHECK(ndm_i_ahead_window(wanted, 7, 3, 1, &held) == 4 && held == 1);
    CHECK(ndm_i_ahead_window(wanted, 7, 5, 1, &held) == 6 && held == 5); /* one at least */
    CHECK(ndm_i_ahead_window(wanted, 7, 7, 1, &held) == 7 && held == 0);
    CHECK(ndm_i_ahead_window(wanted, 0, 0, 1, &held) == 0 && held == 0);
}

int main(void)
{
    test_places_are_put_in_order_and_keep_their_tags();
    test_a_window_holds_as_many_grains_as_it_may();
    return 0;
}
