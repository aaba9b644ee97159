/* Free space in many small pieces, on disk: where values go that are written then, and what compaction reads. How often
 * the core goes to the disk is counted, not timed. */
#define _GNU_SOURCE
#include "check.h"
#include "os/bytes.h"
#include "os/residency.h"
#include "region/ledger.h"

#include <stdbool.h>
#include <string.h>
#include <unistd.h>

enum { KIB = 1024, MIB = 1024 * KIB, SIZE = 100, UNIT = 128, COUNT = 64 * 1024 };

static int64_t slots[COUNT];
static uint64_t rng;

static uint64_t below(uint64_t bound)
{
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return rng % bound;
}

static ndm_options options_for(uint64_t most)
{
    return (ndm_options){.initial_capacity = 64 * KIB, .max_capacity = most, .alignment = 64, .cache_limit = UINT64_MAX};
}

static ndm_region *open_region(uint64_t most)
{
    /* Not in /tmp, which may be in memory. */
    const ndm_options options = options_for(most);
    ndm_region *region = ndm_region_open_temporary("build", &options);
    if (!region)
        region = ndm_region_open_temporary(".", &options);
    CHECK(region);
    rng = 88172645463325252u;
    return region;
}

static int64_t write_one(ndm_region *region, uint64_t number)
{
    uint8_t value[SIZE];
    memset(value, (int)(number % 251), sizeof value);
    memcpy(value, &number, sizeof number);
    const int64_t slot = ndm_region_write(region, value, sizeof value, 0);
    CHECK(slot >= 0);
    return slot;
}

static void check_one(ndm_region *region, int64_t slot, uint64_t number)
{
    uint8_t value[SIZE], found[SIZE];
    memset(value, (int)(number % 251), sizeof value);
    memcpy(value, &number, sizeof number);
    CHECK(ndm_region_read_into(region, slot, found, SIZE) == SIZE && memcmp(found, value, SIZE) == 0);
}

/* Free so many in a hundred values, at random. */
static void free_some(ndm_region *region, uint64_t freed)
{
    for (uint64_t left = COUNT * freed / 100; left > 0;) {
        const uint64_t i = below(COUNT);
        if (slots[i] < 0)
            continue;
        CHECK(ndm_region_free(region, slots[i]) == NDM_OK);
        slots[i] = -1;
        left--;
    }
}

static void fill(ndm_region *region)
{
    for (uint64_t i = 0; i < COUNT; i++)
        slots[i] = write_one(region, i);
}

/* COUNT values, of which `freed` in a hundred are free again, at random; nothing is in RAM. */
static ndm_region *cold_region(uint64_t freed)
{
    ndm_region *region = open_region((uint64_t)1 << 30);
    fill(region);
    free_some(region, freed);
    CHECK(ndm_region_evict(region, NULL, 0) == NDM_OK);
    CHECK(ndm_region_check(region) == 0);
    return region;
}

static void check_values(ndm_region *region)
{
    for (uint64_t i = 0; i < COUNT; i++)
        if (slots[i] >= 0)
            check_one(region, slots[i], i);
    CHECK(ndm_region_check(region) == 0);
}

static uint64_t grains_in_ram(const ndm_region *region)
{
    uint64_t ready = 0;
    for (uint64_t grain = 0; grain < ndm_i_grains_end(region->data.capacity); grain++)
        ready += ndm_i_grain_state(&region->store.grains, grain) == NDM_I_READY;
    return ready;
}

static bool on_disk(const ndm_region *region) { return region->data.keeps_blocks && !region->data.in_memory; }

/* The holes of a grain that was read are filled before another grain is read, and before the mark moves. */
static void test_neighbours(void)
{
    enum { WRITES = 8000 };
    static int64_t fresh[WRITES];
    ndm_region *region = cold_region(50);
    const uint64_t used = region->used_bytes;
    CHECK(!on_disk(region) || grains_in_ram(region) == 0);
    for (uint64_t i = 0; i < WRITES; i++)
        fresh[i] = write_one(region, COUNT + i);
    /* A grain has 2048 holes of one unit here, more or less; those longer than two are kept for longer values. */
    const uint64_t grains = region->store.fetched / NDM_I_GRAIN;
    CHECK(!on_disk(region) || (grains >= 1 && grains <= WRITES / 500));
    CHECK(region->used_bytes == used);
    for (uint64_t i = 0; i < WRITES; i++)
        check_one(region, fresh[i], COUNT + i);
    check_values(region);
    ndm_region_destroy(region);
}

/* Where most is free, the best holes are few, and longer ones of the same grain are used before another is read. */
static void test_where_most_is_free(void)
{
    enum { WRITES = 6000 };
    ndm_region *region = cold_region(90);
    const uint64_t used = region->used_bytes;
    for (uint64_t i = 0; i < WRITES; i++)
        write_one(region, COUNT + i);
    CHECK(region->store.fetched / NDM_I_GRAIN <= 8 && region->used_bytes == used); /* of 16 */
    check_values(region);
    ndm_region_destroy(region);
}

static int64_t allocate_one(ndm_region *region, uint64_t number)
{
    char *view;
    const int64_t slot = ndm_region_allocate(region, SIZE, 0, &view);
    CHECK(slot >= 0);
    memset(view, (int)(number % 251), SIZE);
    memcpy(view, &number, sizeof number);
    ndm_view_release(view);
    CHECK(ndm_region_commit(region, slot) == NDM_OK);
    return slot;
}

/* Once all has been written back, the first store to each page faults; but a grain is soon mapped anew as a whole. */
static void test_written_back(void)
{
    enum { TURNS = 4, PAGES = COUNT * UNIT / (4 * KIB) };
    ndm_region *region = open_region((uint64_t)1 << 30);
    fill(region);
    for (int turn = 0; turn < TURNS; turn++) {
        if (turn == 1) { /* the next number is none */
            region->store.round = UINT8_MAX;
            memset(region->store.grains.rounds, UINT8_MAX, region->store.grains.room);
        }
        const unsigned round = region->store.round;
        const uint64_t used = region->used_bytes;
        free_some(region, 50);
        CHECK(ndm_region_flush(region) == NDM_OK);
        const uint64_t faults = ndm_i_mapping_faults();
        for (uint64_t i = 0; i < COUNT; i++)
            if (slots[i] < 0)
                slots[i] = turn % 2 == 0 ? write_one(region, i) : allocate_one(region, i);
        CHECK(!on_disk(region) || region->store.round != round);
        CHECK(!region->data.large_folios || ndm_i_mapping_faults() - faults < PAGES * 2 / 3);
        CHECK(region->used_bytes == used);
        check_values(region);
    }
    ndm_region_destroy(region);
}

/* One store to the slot table does not make much of it dirty. */
static void test_the_slot_table_in_small_pieces(void)
{
    enum { PIECES = 3 * 32 * KIB }; /* of the header, of the record, and of what the kernel adds */
    uint64_t resident, unwritten;
    const ndm_options options = options_for((uint64_t)1 << 30);
    ndm_region *region = ndm_region_open("build/scattered", &options);
    CHECK(region);
    fill(region);
    CHECK(ndm_i_file_sync(&region->slots.table) == 0);
    CHECK(ndm_region_free(region, slots[COUNT / 2]) == NDM_OK);
    CHECK(ndm_i_residency(&region->slots.table, &resident, &unwritten) == NDM_OK && unwritten <= PIECES);
    ndm_region_destroy(region);
    CHECK(unlink("build/scattered") == 0 && unlink("build/scattered.slots") == 0);
}

/* One hole of a grain does not pay for reading the whole of it. */
static void test_a_lonely_hole(void)
{
    ndm_region *region = cold_region(0);
    const uint64_t used = region->used_bytes;
    CHECK(ndm_region_free(region, slots[COUNT / 2]) == NDM_OK);
    const uint64_t fetched = region->store.fetched;
    slots[COUNT / 2] = write_one(region, COUNT / 2);
    CHECK(region->store.fetched == fetched && region->used_bytes == used);
    check_values(region);
    ndm_region_destroy(region);
}

/* A whole compaction reads the file about once. */
static void test_whole_pass(void)
{
    ndm_region *region = cold_region(50);
    ndm_compaction done;
    const uint64_t used = region->used_bytes;
    CHECK(ndm_region_compact(region, UINT64_MAX, &done) == NDM_OK && done.remaining_bytes == 0);
    CHECK(region->store.fetched <= used + used / 4 && done.moved_bytes <= region->live_bytes * 55 / 100);
    CHECK(region->used_bytes <= COUNT / 2 * UNIT * 102 / 100);
    check_values(region);
    ndm_region_destroy(region);
}

/* Each slice reads and moves no more than it may, goes on where the last one stopped, and in the end nothing is left. */
static void test_slices(void)
{
    enum { BUDGET = 128 * KIB };
    ndm_region *region = cold_region(50);
    ndm_compaction done = {.remaining_bytes = 1};
    const uint64_t used = region->used_bytes;
    uint64_t slices = 0;
    for (; done.remaining_bytes > 0; slices++) {
        const uint64_t fetched = region->store.fetched, mark = region->used_bytes;
        CHECK(ndm_region_compact(region, BUDGET, &done) == NDM_OK && done.moved_bytes <= BUDGET);
        CHECK(region->store.fetched - fetched <= 2 * MIB + 6 * BUDGET + 4 * NDM_I_GRAIN);
        CHECK(region->used_bytes <= mark && slices < 1000);
        if (slices % 5 == 0) {
            CHECK(ndm_region_check(region) == 0);
            CHECK(ndm_region_evict(region, NULL, 0) == NDM_OK);
        }
    }
    CHECK(region->store.fetched <= 3 * used);
    CHECK(region->used_bytes <= COUNT / 2 * UNIT * 102 / 100);
    check_values(region);
    ndm_region_destroy(region);
}

/* What is viewed stays where it is, and the pass goes on behind it. */
static void test_views_in_the_way(void)
{
    enum { VIEWS = 64 };
    ndm_region *region = cold_region(60);
    const char *views[VIEWS];
    uint64_t shown[VIEWS], size;
    ndm_slot before[VIEWS], after;
    for (int i = 0; i < VIEWS; i++) {
        do
            shown[i] = below(COUNT);
        while (slots[shown[i]] < 0);
        CHECK((views[i] = ndm_region_read(region, slots[shown[i]], &size)) && size == SIZE);
        CHECK(ndm_region_slot(region, slots[shown[i]], &before[i]) == NDM_OK);
    }
    ndm_compaction done;
    CHECK(ndm_region_compact(region, 2 * MIB, &done) == NDM_OK && ndm_region_check(region) == 0);
    CHECK(ndm_region_compact(region, UINT64_MAX, &done) == NDM_OK && done.remaining_bytes == 0);
    for (int i = 0; i < VIEWS; i++) {
        CHECK(ndm_region_slot(region, slots[shown[i]], &after) == NDM_OK && after.offset == before[i].offset);
        CHECK(memcmp(views[i], &shown[i], sizeof shown[i]) == 0);
        ndm_view_release(views[i]);
    }
    check_values(region);
    CHECK(ndm_region_compact(region, UINT64_MAX, &done) == NDM_OK);
    CHECK(region->used_bytes <= COUNT * 2 / 5 * UNIT * 102 / 100);
    check_values(region);
    ndm_region_destroy(region);
}

int main(void)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {
        {"the holes of a grain are filled one after the other", test_neighbours},
        {"where most is free, longer holes are used", test_where_most_is_free},
        {"a grain that was written back is mapped anew", test_written_back},
        {"the slot table is dirtied in small pieces", test_the_slot_table_in_small_pieces},
        {"a lonely hole costs no grain", test_a_lonely_hole},
        {"a whole compaction reads the file once", test_whole_pass},
        {"slices go on where the last one stopped", test_slices},
        {"views in the way of the pass", test_views_in_the_way},
    };
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        tests[i].run();
        printf("ok  %s\n", tests[i].name);
    }
    return 0;
}
