/* Counters that come to their end: the generation of a slot, and the moves of a value. No old reference, and no reader that
 * looks on, may take what came later for what it knew. Exits 1 at the first thing that is wrong. */
#define _GNU_SOURCE
#include "check.h"

#include "region/ledger.h"

#include <string.h>
#include <unistd.h>

enum { MOVES = 1 << 16 };

static char directory[] = "/tmp/nodedb-mem-test-XXXXXX";
static char path[100], slots_path[110], leases_path[110];

static ndm_region *opened(int recover)
{
    const ndm_options options = {.initial_capacity = 1 << 20,
                                 .max_capacity = 1 << 24,
                                 .alignment = 64,
                                 .cache_limit = UINT64_MAX,
                                 .recover = recover};
    ndm_region *region = ndm_region_open(path, &options);
    CHECK(region);
    return region;
}

static void set_generation(ndm_region *region, int64_t slot, uint32_t generation)
{
    ndm_i_record *record = ndm_i_slots_record(&region->slots, slot);
    atomic_store(&record->life, generation | (uint64_t)ndm_i_record_link(record) << 32);
}

static uint32_t generation_of(const ndm_region *region, int64_t slot)
{
    return ndm_i_record_generation(ndm_i_slots_record(&region->slots, slot));
}

/* A value has each generation up to the last but one; then the slot is retired, also for whoever recovers the table. */
static void generations_end(void)
{
    ndm_region *region = opened(0);
    CHECK(ndm_region_write(region, "a", 1, 0) == 0 && ndm_region_write(region, "b", 1, 0) == 1);
    set_generation(region, 0, NDM_I_LAST_GENERATION - 2);
    CHECK(ndm_region_free(region, 0) == NDM_OK && ndm_region_write(region, "c", 1, 0) == 0);
    CHECK(generation_of(region, 0) == NDM_I_LAST_GENERATION - 1 && ndm_region_check(region) == 0);
    CHECK(ndm_region_free(region, 0) == NDM_OK && ndm_region_check(region) == 0);
    CHECK(region->slots.retired == 1 && region->slots.live == 1 && region->slots.count == 2);
    CHECK(ndm_region_contains(region, 0) == 0 && ndm_region_free(region, 0) == NDM_ERR_FREED_SLOT);
    CHECK(ndm_region_write(region, "d", 1, 0) == 2 && ndm_region_free(region, 2) == NDM_OK);
    CHECK(ndm_region_write(region, "e", 1, 0) == 2);
    for (int recovered = 0; recovered < 2; recovered++) {
        ndm_region_destroy(region);
        region = opened(1);
        CHECK(ndm_region_check(region) == 0 && region->slots.retired == 1 && region->slots.live == 2);
        CHECK(generation_of(region, 0) == NDM_I_LAST_GENERATION);
        CHECK(ndm_region_write(region, "f", 1, 0) == 3 && ndm_region_free(region, 3) == NDM_OK);
    }
    /* More values than are free: the retired one is not counted on. */
    const void *parts[3000];
    uint64_t sizes[3000];
    int64_t slots[3000];
    for (int i = 0; i < 3000; i++) {
        parts[i] = "g";
        sizes[i] = 1;
    }
    CHECK(ndm_region_write_many(region, parts, sizes, 3000, 0, slots) == NDM_OK && ndm_region_check(region) == 0);
    for (int i = 0; i < 3000; i++)
        CHECK(slots[i] != 0);
    /* An older table may hold a value of the last generation. */
    set_generation(region, 1, NDM_I_LAST_GENERATION);
    ndm_region_destroy(region);
    region = opened(1);
    CHECK(ndm_region_check(region) == 0 && ndm_region_free(region, 1) == NDM_OK && ndm_region_check(region) == 0);
    CHECK(region->slots.retired == 2 && generation_of(region, 1) == NDM_I_LAST_GENERATION);
    ndm_region_destroy(region);
}

/* The table says that the value moves to and fro, until its place is the very word that it was. */
static void move_around(ndm_region *region, uint32_t slot, uint64_t moves)
{
    const uint64_t home = ndm_i_record_offset(ndm_i_slots_record(&region->slots, slot));
    const uint32_t extent = ndm_i_record_link(ndm_i_slots_record(&region->slots, slot));
    for (uint64_t i = 1; i <= moves; i++) {
        const uint64_t to = home + (i % 2 == 0 ? 0 : 4096);
        ndm_i_slots_move_begin(&region->slots, slot, to);
        ndm_i_slots_move_end(&region->slots, slot, to, extent);
    }
}

static void moves_begin_anew(void)
{
    ndm_region *region = opened(0);
    char value[8192];
    CHECK(ndm_region_write(region, memset(value, 1, sizeof value), sizeof value, 0) == 0);
    ndm_reader *reader = ndm_reader_open(path, slots_path, leases_path);
    ndm_value before, after;
    CHECK(reader && ndm_reader_find(reader, 0, -1, &before) == NDM_OK);
    CHECK(ndm_reader_is_unchanged(reader, &before) == 1);
    move_around(region, 0, MOVES - 2);
    CHECK(ndm_reader_is_unchanged(reader, &before) == 0);
    move_around(region, 0, 2);
    CHECK(ndm_reader_find(reader, 0, -1, &after) == NDM_OK && after.place == before.place);
    CHECK(after.turns != before.turns && ndm_reader_is_unchanged(reader, &before) == 0);
    CHECK(ndm_reader_is_unchanged(reader, &after) == 1);
    ndm_region_destroy(region);
    region = opened(1); /* a later owner goes on counting */
    move_around(region, 0, MOVES);
    CHECK(ndm_reader_is_unchanged(reader, &after) == 0);
    ndm_reader_destroy(reader);
    CHECK(ndm_region_check(region) == 0);
    ndm_region_destroy(region);
}

int main(void)
{
    CHECK(mkdtemp(directory));
    snprintf(path, sizeof path, "%s/region", directory);
    snprintf(slots_path, sizeof slots_path, "%s.slots", path);
    snprintf(leases_path, sizeof leases_path, "%s.leases", path);
    generations_end();
    moves_begin_anew();
    unlink(path);
    unlink(slots_path);
    unlink(leases_path);
    rmdir(directory);
    printf("counters: none begins anew unseen\n");
    return 0;
}
