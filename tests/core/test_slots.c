/* The slot table by itself: records, the order of reuse, generations, drafts, moves, a dead owner's table, and a checker
 * that finds what is planted.
 *
 * usage: test_slots [directory] */
#define _GNU_SOURCE
#include "check.h"
#include "store/slots.h"

#include <errno.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#define MOST_PLACE (NDM_I_SIZE_LIMIT - 1)

static const char *directory = ".";

static void start(ndm_i_slots *slots)
{
    static const ndm_i_file data = {.fd = -1, .inode = 5, .born = 6};
    CHECK(ndm_i_slots_open(slots, NULL, true) == NDM_OK);
    CHECK(slots->found == NDM_I_NO_TABLE && !slots->started);
    CHECK(ndm_i_slots_prepare(slots, &data) == NDM_OK && !slots->started);
    CHECK(ndm_i_slots_start(slots, &data, 64) == NDM_OK && slots->started);
    CHECK(ndm_i_slots_check(slots) == 0);
}

static void stop(ndm_i_slots *slots)
{
    CHECK(ndm_i_slots_check(slots) == 0);
    ndm_i_slots_close(slots, NULL);
    CHECK(slots->count == 0 && slots->live == 0 && slots->table.fd == -1);
}

static uint32_t add(ndm_i_slots *slots, uint64_t offset, uint32_t extent, uint8_t state)
{
    CHECK(ndm_i_slots_reserve(slots, 1) == NDM_OK);
    return ndm_i_slots_add(slots, offset, 10, 3, extent, state);
}

static ndm_i_record *at(const ndm_i_slots *slots, uint32_t slot)
{
    ndm_i_record *record = ndm_i_slots_record(slots, slot);
    CHECK(record);
    return record;
}

static void test_fields(void)
{
    ndm_i_slots slots;
    start(&slots);
    CHECK(!ndm_i_slots_record(&slots, 0) && !ndm_i_slots_record(&slots, -1));
    CHECK(ndm_i_slots_reserve(&slots, 3) == NDM_OK);
    CHECK(ndm_i_slots_add(&slots, MOST_PLACE, 0, 255, NDM_I_NO_SLOT - 1, NDM_I_LIVE) == 0);
    CHECK(ndm_i_slots_add(&slots, 0, MOST_PLACE, 0, 0, NDM_I_DRAFT) == 1);
    CHECK(ndm_i_slots_add(&slots, 64, 13, 7, NDM_I_NO_SLOT, NDM_I_LIVE) == 2);
    const struct {
        uint64_t offset, size;
        uint32_t link;
        uint8_t engine, state;
    } wanted[] = {{MOST_PLACE, 0, NDM_I_NO_SLOT - 1, 255, NDM_I_LIVE},
                  {0, MOST_PLACE, 0, 0, NDM_I_DRAFT},
                  {64, 13, NDM_I_NO_SLOT, 7, NDM_I_LIVE}};
    for (uint32_t slot = 0; slot < 3; slot++) {
        const ndm_i_record *record = at(&slots, slot);
        CHECK(ndm_i_record_offset(record) == wanted[slot].offset && ndm_i_record_size(record) == wanted[slot].size);
        CHECK(ndm_i_record_engine(record) == wanted[slot].engine && ndm_i_record_state(record) == wanted[slot].state);
        CHECK(ndm_i_record_link(record) == wanted[slot].link && ndm_i_record_generation(record) == 0);
        CHECK(ndm_i_record_is_live(record));
    }
    ndm_i_slots_set_extent(&slots, 1, 77);
    CHECK(ndm_i_record_link(at(&slots, 1)) == 77 && ndm_i_record_size(at(&slots, 1)) == MOST_PLACE);
    CHECK(!ndm_i_slots_record(&slots, 3) && !ndm_i_slots_record(&slots, INT64_MAX));
    CHECK(slots.count == 3 && slots.live == 3 && ndm_i_word(&ndm_i_slots_header(&slots)->count) == 3);
    stop(&slots);
}

/* Last freed, first used; and each free is another generation. */
static void test_reuse(void)
{
    ndm_i_slots slots;
    start(&slots);
    for (uint32_t i = 0; i < 5; i++)
        CHECK(add(&slots, i * 64, i, NDM_I_LIVE) == i);
    const uint32_t freed[] = {1, 4, 2};
    for (int i = 0; i < 3; i++) {
        ndm_i_slots_remove(&slots, freed[i]);
        CHECK(ndm_i_record_state(at(&slots, freed[i])) == NDM_I_FREED && !ndm_i_record_is_live(at(&slots, freed[i])));
        CHECK(ndm_i_record_generation(at(&slots, freed[i])) == 1);
        CHECK(ndm_i_slots_check(&slots) == 0);
    }
    CHECK(slots.live == 2 && slots.count == 5);
    for (int i = 3; i-- > 0;)
        CHECK(add(&slots, 640, 9, NDM_I_LIVE) == freed[i] && ndm_i_record_generation(at(&slots, freed[i])) == 1);
    CHECK(add(&slots, 704, 9, NDM_I_LIVE) == 5 && slots.first_free == NDM_I_NO_SLOT);
    ndm_i_slots_remove(&slots, 0);
    CHECK(add(&slots, 0, 3, NDM_I_DRAFT) == 0);
    ndm_i_slots_remove(&slots, 0); /* a draft can go as it is */
    CHECK(ndm_i_record_generation(at(&slots, 0)) == 2);

    /* After the last generation the slot is retired; the chain is as it was. */
    CHECK(add(&slots, 0, 3, NDM_I_LIVE) == 0);
    atomic_store(&at(&slots, 0)->life, UINT32_MAX | (uint64_t)3 << 32);
    ndm_i_slots_remove(&slots, 3);
    ndm_i_slots_remove(&slots, 0);
    CHECK(ndm_i_record_generation(at(&slots, 0)) == UINT32_MAX && slots.retired == 1 && slots.first_free == 3);
    CHECK(ndm_i_slots_check(&slots) == 0 && add(&slots, 0, 3, NDM_I_LIVE) == 3 && add(&slots, 0, 3, NDM_I_LIVE) == 6);
    stop(&slots);
}

static void test_reserve(void)
{
    enum { MANY = 9000 };
    ndm_i_slots slots;
    start(&slots);
    const uint64_t first_room = slots.table.capacity;
    for (uint32_t i = 0; i < 10; i++)
        CHECK(add(&slots, i * 64, i, NDM_I_LIVE) == i);
    ndm_i_slots_remove(&slots, 7);
    CHECK(slots.table.capacity == first_room);

    /* A refusal changes nothing. Slots that are free already need no room. */
    struct rlimit unlimited, limit;
    CHECK(getrlimit(RLIMIT_FSIZE, &unlimited) == 0);
    limit = unlimited;
    limit.rlim_cur = first_room;
    const uint64_t room = (first_room - NDM_I_HEADER_ROOM) / sizeof(ndm_i_record);
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    CHECK(ndm_i_slots_reserve(&slots, room - 9) == NDM_OK && slots.table.capacity == first_room);
    CHECK(ndm_i_slots_reserve(&slots, room - 8) == NDM_ERR_IO);
    CHECK(ndm_last_error()->os_errno == EFBIG && ndm_last_error()->file == NDM_FILE_SLOTS);
    CHECK(setrlimit(RLIMIT_FSIZE, &unlimited) == 0);
    CHECK(slots.table.capacity == first_room && slots.count == 10 && ndm_i_slots_check(&slots) == 0);
    for (int shift = 32; shift < 65; shift++) {
        const uint64_t most = shift < 64 ? (uint64_t)1 << shift : UINT64_MAX;
        CHECK(ndm_i_slots_reserve(&slots, most) == NDM_ERR_MEMORY);
        CHECK(ndm_i_slots_reserve(&slots, most - 1 + (shift == 32) * 2) == NDM_ERR_MEMORY);
    }
    CHECK(slots.table.capacity == first_room);

    CHECK(ndm_i_slots_reserve(&slots, MANY) == NDM_OK);
    const uint64_t large = slots.table.capacity;
    CHECK(large >= NDM_I_HEADER_ROOM + (9 + MANY) * sizeof(ndm_i_record));
    for (uint32_t i = 0; i < MANY; i++)
        CHECK(ndm_i_slots_add(&slots, i, 1, 0, i, NDM_I_LIVE) == (i == 0 ? 7 : 9 + i));
    CHECK(slots.table.capacity == large && slots.live == 9 + MANY);
    for (uint32_t i = 0; i < 10; i++)
        CHECK(i == 7 || ndm_i_record_offset(at(&slots, i)) == i * 64);
    stop(&slots);
}

static void test_drafts(void)
{
    ndm_i_slots slots;
    start(&slots);
    CHECK(add(&slots, 128, 1, NDM_I_DRAFT) == 0 && slots.live == 1);
    CHECK(ndm_i_record_state(at(&slots, 0)) == NDM_I_DRAFT && ndm_i_record_is_live(at(&slots, 0)));
    for (int i = 0; i < 2; i++) {
        ndm_i_slots_commit(&slots, 0);
        CHECK(ndm_i_record_state(at(&slots, 0)) == NDM_I_LIVE && slots.live == 1);
        CHECK(ndm_i_record_size(at(&slots, 0)) == 10 && ndm_i_record_engine(at(&slots, 0)) == 3);
    }
    stop(&slots);
}

static void test_moves(void)
{
    ndm_i_slots slots;
    start(&slots);
    ndm_i_header *header = ndm_i_slots_header(&slots);
    CHECK(add(&slots, 4096, 1, NDM_I_LIVE) == 0 && add(&slots, 8192, 2, NDM_I_DRAFT) == 1);
    for (uint32_t slot = 0; slot < 2; slot++) {
        const uint8_t state = ndm_i_record_state(at(&slots, slot));
        const uint64_t from = ndm_i_record_offset(at(&slots, slot)), place = ndm_i_word(&at(&slots, slot)->place);
        atomic_store(&header->moved, 5);
        ndm_i_slots_move_begin(&slots, slot, 64);
        CHECK(ndm_i_word(&header->move_slot) == slot + 1 && ndm_i_word(&header->moved) == 0);
        CHECK(ndm_i_word(&header->move_from) == from && ndm_i_word(&header->move_to) == 64);
        CHECK(ndm_i_record_state(at(&slots, slot)) == (state == NDM_I_LIVE ? NDM_I_MOVING : NDM_I_DRAFT));
        ndm_i_slots_move_cancel(&slots, slot);
        CHECK(ndm_i_word(&header->move_slot) == 0 && ndm_i_record_state(at(&slots, slot)) == state);
        CHECK(ndm_i_word(&at(&slots, slot)->place) == place && ndm_i_record_link(at(&slots, slot)) == slot + 1);
        ndm_i_slots_move_begin(&slots, slot, 64);
        ndm_i_slots_move_end(&slots, slot, 64, 9);
        CHECK(ndm_i_word(&header->move_slot) == 0 && ndm_i_record_state(at(&slots, slot)) == state);
        CHECK(ndm_i_word(&at(&slots, slot)->place) == (64 | (uint64_t)1 << 48));
        CHECK(ndm_i_record_offset(at(&slots, slot)) == 64 && ndm_i_record_link(at(&slots, slot)) == 9);
    }
    for (uint64_t moves = 2; moves <= 0x10000; moves++) { /* their number comes round; the offset stays whole */
        ndm_i_slots_move_begin(&slots, 0, MOST_PLACE);
        ndm_i_slots_move_end(&slots, 0, MOST_PLACE, 9);
        CHECK(ndm_i_word(&at(&slots, 0)->place) == (MOST_PLACE | moves << 48));
    }
    stop(&slots);
}

/* ---- a table on disk ------------------------------------------------------------------------------------ */

static char data_path[256], table_path[270];

static void open_both(ndm_i_file *data, ndm_i_slots *slots, ndm_i_found_table found)
{
    CHECK(ndm_i_file_open(data, data_path, true, NDM_I_LOCK_FILE) == NDM_OK);
    CHECK(ndm_i_slots_open(slots, table_path, true) == NDM_OK && slots->found == found);
}

/* The owner's process ends with a value withdrawn, but not yet of another generation; with a draft; and in a move. */
static void die(void)
{
    ndm_i_file data;
    ndm_i_slots slots;
    open_both(&data, &slots, NDM_I_NO_TABLE);
    CHECK(ndm_i_slots_prepare(&slots, &data) == NDM_OK);
    CHECK(ndm_i_slots_start(&slots, &data, 64) == NDM_OK);
    for (uint32_t i = 0; i < 6; i++)
        CHECK(add(&slots, i * 64, i, i == 3 ? NDM_I_DRAFT : NDM_I_LIVE) == i);
    ndm_i_slots_remove(&slots, 5);
    atomic_store(&at(&slots, 1)->shape, (ndm_i_word(&at(&slots, 1)->shape) & ~((uint64_t)0xff << 56)) |
                                            (uint64_t)NDM_I_FREED << 56);
    ndm_i_slots_move_begin(&slots, 4, 6400);
    _exit(0);
}

static void test_rebuild(void)
{
    ndm_i_file data;
    ndm_i_slots slots;
    int status;
    snprintf(data_path, sizeof data_path, "%s/test-slots-%d", directory, getpid());
    snprintf(table_path, sizeof table_path, "%s.slots", data_path);
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0)
        die();
    CHECK(waitpid(child, &status, 0) == child && status == 0);

    open_both(&data, &slots, NDM_I_TABLE);
    CHECK(ndm_i_slots_adopt(&slots, &data) == NDM_OK && slots.count == 6 && !slots.started);
    CHECK(ndm_i_word(&ndm_i_slots_header(&slots)->owner) == (uint64_t)child);
    ndm_i_slots_take_over(&slots, &data);
    CHECK(ndm_i_word(&ndm_i_slots_header(&slots)->owner) == (uint64_t)getpid());
    CHECK(ndm_i_slots_check(&slots) > 0); /* its chain is not known yet */
    ndm_i_slots_move_cancel(&slots, 4);
    ndm_i_slots_rebuild(&slots);
    CHECK(ndm_i_slots_check(&slots) == 0 && slots.live == 3);
    const uint32_t generations[] = {0, 1, 0, 1, 0, 2};
    for (uint32_t slot = 0; slot < 6; slot++) {
        CHECK(ndm_i_record_generation(at(&slots, slot)) == generations[slot]);
        CHECK(ndm_i_record_is_live(at(&slots, slot)) == (generations[slot] == 0));
    }
    CHECK(add(&slots, 0, 1, NDM_I_LIVE) == 1 && add(&slots, 0, 1, NDM_I_LIVE) == 3 && add(&slots, 0, 1, NDM_I_LIVE) == 5);
    CHECK(add(&slots, 0, 1, NDM_I_LIVE) == 6);

    /* What cannot be believed is not taken over. */
    ndm_i_header *header = ndm_i_slots_header(&slots);
    const uint64_t count = ndm_i_word(&header->count);
    ndm_i_file other = data;
    CHECK(ndm_i_header_check(header, &data) == NDM_OK);
    other.inode++, other.born++;
    CHECK(ndm_i_header_check(header, &other) == NDM_ERR_IO);
    header->version++;
    CHECK(ndm_i_header_check(header, &data) == NDM_ERR_IO && ndm_last_error()->os_errno == EINVAL);
    header->version--;
    atomic_store(&header->count, (slots.table.capacity - NDM_I_HEADER_ROOM) / sizeof(ndm_i_record) + 1);
    ndm_i_slots_close(&slots, NULL);
    CHECK(ndm_i_slots_open(&slots, table_path, false) == NDM_OK && slots.found == NDM_I_TABLE);
    CHECK(ndm_i_slots_adopt(&slots, &data) == NDM_ERR_IO && ndm_last_error()->os_errno == EUCLEAN);
    atomic_store(&ndm_i_slots_header(&slots)->count, count);
    ndm_i_slots_close(&slots, NULL);

    /* To get ready to empty a table leaves it whole. */
    CHECK(ndm_i_slots_open(&slots, table_path, false) == NDM_OK);
    CHECK(ndm_i_slots_prepare(&slots, &data) == NDM_OK && ndm_i_word(&ndm_i_slots_header(&slots)->count) == count);
    ndm_i_slots_close(&slots, NULL);
    CHECK(ndm_i_slots_open(&slots, table_path, false) == NDM_OK && slots.found == NDM_I_TABLE);
    CHECK(ndm_i_slots_adopt(&slots, &data) == NDM_OK && slots.count == count);
    ndm_i_slots_invalidate(&slots);
    ndm_i_slots_close(&slots, NULL);
    CHECK(ndm_i_slots_open(&slots, table_path, false) == NDM_OK && slots.found == NDM_I_VACANT_TABLE);
    CHECK(ndm_i_slots_adopt(&slots, &data) == NDM_ERR_IO && ndm_last_error()->os_errno == EUCLEAN);
    ndm_i_slots_close(&slots, table_path);
    ndm_i_file_close(&data, data_path);
}

/* ---- the checker ---------------------------------------------------------------------------------------- */

static void set_state(ndm_i_slots *slots, uint32_t slot, uint8_t state)
{
    ndm_i_record *record = at(slots, slot);
    atomic_store(&record->shape, (ndm_i_word(&record->shape) & ~((uint64_t)0xff << 56)) | (uint64_t)state << 56);
}

static void set_link(ndm_i_slots *slots, uint32_t slot, uint32_t link)
{
    atomic_store(&at(slots, slot)->life, ndm_i_record_generation(at(slots, slot)) | (uint64_t)link << 32);
}

static void test_damage(void)
{
    ndm_i_slots slots;
    start(&slots);
    for (uint32_t i = 0; i < 6; i++)
        CHECK(add(&slots, i * 64, i, NDM_I_LIVE) == i);
    for (uint32_t i = 1; i < 6; i += 2)
        ndm_i_slots_remove(&slots, i); /* the chain: 5, 3, 1 */
    CHECK(ndm_i_slots_check(&slots) == 0);

    const struct {
        uint32_t slot;
        uint8_t state;
    } states[] = {{0, NDM_I_UNUSED}, {0, NDM_I_MOVING}, {0, NDM_I_FREED}, {0, 200}, {3, NDM_I_LIVE}, {3, NDM_I_DRAFT},
                  {3, NDM_I_UNUSED}};
    for (size_t i = 0; i < sizeof states / sizeof *states; i++) {
        const uint8_t sound = ndm_i_record_state(at(&slots, states[i].slot));
        set_state(&slots, states[i].slot, states[i].state);
        CHECK(ndm_i_slots_check(&slots) > 0);
        set_state(&slots, states[i].slot, sound);
        CHECK(ndm_i_slots_check(&slots) == 0);
    }
    /* Past the table, to a live slot, too short, in a circle. */
    const uint32_t links[] = {6, UINT32_MAX - 1, 0, NDM_I_NO_SLOT, 5, 3};
    for (size_t i = 0; i < sizeof links / sizeof *links; i++) {
        set_link(&slots, 3, links[i]);
        CHECK(ndm_i_slots_check(&slots) > 0);
        set_link(&slots, 3, 1);
        CHECK(ndm_i_slots_check(&slots) == 0);
    }
    ndm_i_slots wrong = slots;
    wrong.first_free = 3;
    CHECK(ndm_i_slots_check(&wrong) > 0);
    wrong = slots;
    wrong.live++;
    CHECK(ndm_i_slots_check(&wrong) == 1);
    wrong.live -= 2;
    CHECK(ndm_i_slots_check(&wrong) == 1);
    wrong = slots;
    wrong.table.capacity = NDM_I_HEADER_ROOM + 5 * sizeof(ndm_i_record);
    CHECK(ndm_i_slots_check(&wrong) == 1);
    atomic_store(&ndm_i_slots_header(&slots)->count, 7);
    CHECK(ndm_i_slots_check(&slots) == 1);
    atomic_store(&ndm_i_slots_header(&slots)->count, 6);
    stop(&slots);
}

int main(int argc, char **argv)
{
    if (argc > 1)
        directory = argv[1];
    else if (getenv("TMPDIR"))
        directory = getenv("TMPDIR");
    test_fields();
    test_reuse();
    test_reserve();
    test_drafts();
    test_moves();
    test_rebuild();
    test_damage();
    puts("slots: fields, reuse, reserve, drafts, moves, rebuild, damage: ok");
    return 0;
}
