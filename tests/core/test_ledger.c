/* The ledger by itself: what is taken and undone leaves the space as it was, wherever in a batch the refusal comes; values
 * are entered, removed, kept in limbo and come home; extents are adopted at their places.
 *
 * usage: test_ledger [directory] */
#define _GNU_SOURCE
#include "check.h"
#include "region/ledger.h"
#include "store/extents_node.h"

#include <errno.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#define KIB ((uint64_t)1024)

enum { MOST = 64 };

static const char *directory = ".";

static ndm_region *open_region(uint64_t initial, uint64_t ceiling)
{
    const ndm_options options = {
        .initial_capacity = initial, .max_capacity = ceiling, .alignment = 64, .cache_limit = UINT64_MAX};
    ndm_region *region = ndm_region_open_temporary(directory, &options);
    CHECK(region && ndm_region_check(region) == 0);
    return region;
}

static void close_region(ndm_region *region)
{
    CHECK(ndm_region_check(region) == 0);
    ndm_region_destroy(region);
}

static uint8_t bytes[1 << 20];

static int64_t write_value(ndm_region *region, uint64_t size)
{
    const int64_t slot = ndm_region_write(region, bytes, size, 1);
    CHECK(slot >= 0);
    return slot;
}

/* ---- all that may not change ---------------------------------------------------------------------------- */

typedef struct {
    struct {
        uint64_t offset, length, tag;
    } extents[MOST];
    uint64_t count, mark, free_units, free_count, capacity, file_size;
    uint64_t used, live, growths, slot_count, live_slots, limbo;
} picture;

static picture take_picture(const ndm_region *region)
{
    const ndm_i_extents *extents = &region->extents;
    picture now = {.mark = extents->mark, .free_units = extents->free_units, .free_count = extents->free_count};
    for (uint32_t e = ndm_i_extents_first(extents); e != NDM_I_NONE; e = ndm_i_extents_next(extents, e)) {
        CHECK(now.count < MOST);
        now.extents[now.count].offset = ndm_i_extents_offset(extents, e);
        now.extents[now.count].length = ndm_i_extents_length(extents, e);
        now.extents[now.count++].tag = ndm_i_extents_is_free(extents, e) ? UINT64_MAX : ndm_i_extents_tag(extents, e);
    }
    struct stat facts;
    CHECK(fstat(region->data.fd, &facts) == 0);
    now.capacity = region->data.capacity;
    now.file_size = (uint64_t)facts.st_size;
    now.used = region->used_bytes;
    now.live = region->live_bytes;
    now.growths = region->growths;
    now.slot_count = region->slots.count;
    now.live_slots = region->slots.live;
    now.limbo = region->limbo.units;
    return now;
}

static void check_picture(ndm_region *region, const picture *before)
{
    const picture now = take_picture(region);
    CHECK(memcmp(before, &now, sizeof now) == 0);
    CHECK(ndm_region_check(region) == 0);
}

/* Values, and holes of 1, 2, 5 and 9 units between them; the last hole touches the mark. */
static void make_holes(ndm_region *region)
{
    static const uint64_t sizes[] = {64, 64, 64, 128, 64, 320, 64, 576};
    int64_t slots[8];
    for (int i = 0; i < 8; i++)
        slots[i] = write_value(region, sizes[i]);
    for (int i = 1; i < 8; i += 2)
        CHECK(ndm_region_free(region, slots[i]) == NDM_OK);
    CHECK(region->extents.free_units == 17 && region->extents.free_count == 4);
}

/* ---- take and undo -------------------------------------------------------------------------------------- */

static void test_undo(void)
{
    static const uint64_t batches[][6] = {
        {1},                          /* into the smallest hole */
        {0},                          /* no extent at all */
        {64, 128, 320, 0, 576, 64},   /* all holes, and the mark */
        {60, 60, 60, 60, 60, 60},     /* one hole cut up */
        {300, 100, 577, 64, 1, 0},    /* some exact, some past the mark */
        {40 * 1024, 70 * 1024, 1},    /* the file grows */
        {0, 0, 0},
    };
    for (size_t b = 0; b < sizeof batches / sizeof *batches; b++) {
        for (uint64_t count = 1; count <= 6; count++) {
            ndm_region *region = open_region(64 * KIB, 1024 * KIB);
            make_holes(region);
            const picture before = take_picture(region);
            ndm_i_room rooms[6];
            ndm_i_before was;
            for (uint64_t i = 0; i < count; i++)
                rooms[i] = (ndm_i_room){.size = batches[b][i], .extent = 12345};
            CHECK(ndm_i_take(region, rooms, count, &was) == NDM_OK);
            CHECK(was.mark == before.mark && was.capacity == before.capacity);
            uint64_t taken = 0;
            for (uint64_t i = 0; i < count; i++) {
                CHECK((rooms[i].extent == NDM_I_NONE) == (batches[b][i] == 0) && rooms[i].size == batches[b][i]);
                if (rooms[i].extent == NDM_I_NONE)
                    continue;
                const uint64_t start = ndm_i_extents_offset(&region->extents, rooms[i].extent) * 64;
                CHECK(rooms[i].offset == start && rooms[i].vacant >= start + rooms[i].size);
                CHECK(ndm_i_extents_tag(&region->extents, rooms[i].extent) == NDM_I_NONE);
                CHECK(start + rooms[i].size <= region->data.capacity);
                taken += ndm_i_extents_length(&region->extents, rooms[i].extent);
                for (uint64_t k = 0; k < i; k++)
                    CHECK(rooms[k].extent == NDM_I_NONE || rooms[k].offset + rooms[k].size <= start ||
                          start + rooms[i].size <= rooms[k].offset);
            }
            CHECK(region->extents.mark - region->extents.free_units == before.mark - before.free_units + taken);
            CHECK(region->used_bytes == before.used && region->slots.live == before.live_slots);
            ndm_i_undo(region, rooms, count, was);
            check_picture(region, &before);
            close_region(region);
        }
    }
}

/* Bytes were stored into the room already, and the file had grown for it: what the shorter file has lost is not taken for
 * allocated when it grows again. */
static void test_undo_stored(void)
{
    ndm_region *region = open_region(700 * KIB, 4096 * KIB);
    write_value(region, 64);
    const picture before = take_picture(region);
    ndm_i_room rooms[] = {{.size = 64}, {.size = 900 * KIB}};
    ndm_i_before was;
    CHECK(ndm_i_take(region, rooms, 2, &was) == NDM_OK);
    for (int i = 0; i < 2; i++)
        CHECK(ndm_i_store_put(&region->store, rooms[i].offset, bytes, rooms[i].size, rooms[i].vacant) == NDM_OK);
    ndm_i_undo(region, rooms, 2, was);
    check_picture(region, &before);
    CHECK(region->store.allocated <= 700 * KIB);
    write_value(region, 900 * KIB);
    close_region(region);
}

static void take_fails(ndm_region *region, const uint64_t *sizes, uint64_t count, int status)
{
    const picture before = take_picture(region);
    ndm_i_room rooms[8];
    ndm_i_before was;
    for (uint64_t i = 0; i < count; i++)
        rooms[i] = (ndm_i_room){.size = sizes[i], .extent = 12345};
    CHECK(ndm_i_take(region, rooms, count, &was) == status);
    check_picture(region, &before);
}

/* The ceiling refuses in the middle of a batch, at its end, and at once. */
static void test_ceiling(void)
{
    ndm_region *region = open_region(64 * KIB, 128 * KIB);
    make_holes(region);
    take_fails(region, (uint64_t[]){64, 128 * KIB + 1, 64}, 3, NDM_ERR_CAPACITY);
    CHECK(ndm_last_error()->limit == 128 * KIB && ndm_last_error()->required > 128 * KIB);
    take_fails(region, (uint64_t[]){64, 64 * KIB, 64 * KIB}, 3, NDM_ERR_CAPACITY);
    take_fails(region, (uint64_t[]){129 * KIB}, 1, NDM_ERR_CAPACITY);
    take_fails(region, (uint64_t[]){64, NDM_I_SIZE_LIMIT / 2, 64}, 3, NDM_ERR_CAPACITY);
    take_fails(region, (uint64_t[]){64, NDM_I_SIZE_LIMIT / 2 - 1, NDM_I_SIZE_LIMIT / 2 - 1, 64}, 4, NDM_ERR_CAPACITY);
    CHECK(ndm_last_error()->required < NDM_I_SIZE_LIMIT); /* refused where it is passed, before more is added up */
    take_fails(region, (uint64_t[]){1, UINT64_MAX}, 2, NDM_ERR_CAPACITY);
    close_region(region);
}

static struct rlimit unlimited;

static void limit_file_size(uint64_t size)
{
    const struct rlimit limit = {.rlim_cur = size, .rlim_max = unlimited.rlim_max};
    CHECK(setrlimit(RLIMIT_FSIZE, size ? &limit : &unlimited) == 0);
}

/* The system refuses to make the file larger; then it refuses the bytes of one value of a batch. */
static void test_file_size(void)
{
    CHECK(getrlimit(RLIMIT_FSIZE, &unlimited) == 0);
    ndm_region *region = open_region(64 * KIB, 4096 * KIB);
    make_holes(region);
    limit_file_size(96 * KIB);
    take_fails(region, (uint64_t[]){64, 128, 100 * KIB, 64}, 4, NDM_ERR_IO);
    CHECK(ndm_last_error()->os_errno == EFBIG);
    const picture before = take_picture(region);
    ndm_i_room rooms[3] = {{.size = 64}, {.size = 90 * KIB}, {.size = 1}};
    ndm_i_before was;
    CHECK(ndm_i_take(region, rooms, 3, &was) == NDM_OK); /* twice the capacity is refused, what is needed is not */
    CHECK(region->data.capacity > 90 * KIB && region->data.capacity <= 96 * KIB);
    ndm_i_undo(region, rooms, 3, was);
    check_picture(region, &before);

    limit_file_size(0);
    close_region(region);

    /* The first values of this batch are stored, into holes, before the third is refused; then all is undone. */
    const void *parts[] = {bytes, bytes, bytes, bytes};
    int64_t slots[4] = {-7, -7, -7, -7};
    region = open_region(2048 * KIB, 4096 * KIB);
    make_holes(region);
    const picture wide = take_picture(region);
    limit_file_size(600 * KIB);
    CHECK(ndm_region_write_many(region, parts, (uint64_t[]){64, 128, 700 * KIB, 64}, 4, 1, slots) == NDM_ERR_IO);
    CHECK(ndm_last_error()->os_errno == EFBIG && slots[0] == -7 && slots[3] == -7);
    check_picture(region, &wide);
    CHECK(ndm_region_write(region, bytes, 700 * KIB, 1) == NDM_ERR_IO);
    check_picture(region, &wide);
    CHECK(ndm_region_write_vectored(region, parts, (uint64_t[]){64, 700 * KIB}, 2, 0, 1) == NDM_ERR_IO);
    check_picture(region, &wide);
    char *view = NULL;
    CHECK(ndm_region_allocate(region, 700 * KIB, 1, &view) == NDM_ERR_IO && !view);
    check_picture(region, &wide);
    CHECK(!ndm_i_pins_any(&region->home));
    limit_file_size(0);
    CHECK(ndm_region_write_many(region, parts, (uint64_t[]){64, 128, 700 * KIB, 64}, 4, 1, slots) == NDM_OK);
    close_region(region);
}

/* No memory for one extent of a batch: as many nodes exist as can be numbered, but for some that are spare. */
static void test_memory(void)
{
    for (uint32_t spares = 0; spares < 6; spares++) {
        ndm_region *region = open_region(64 * KIB, 128 * KIB);
        make_holes(region);
        int64_t slots[8];
        for (uint32_t i = 0; i < spares; i++)
            slots[i] = write_value(region, 640);
        for (uint32_t i = 0; i < spares; i++) /* they join the hole before them, and leave their nodes */
            CHECK(ndm_region_free(region, slots[i]) == NDM_OK);
        ndm_i_extents *extents = &region->extents;
        const picture before = take_picture(region);
        const uint32_t room = extents->node_room, count = extents->node_count, spare = extents->spare_count;
        CHECK(spare == (spares > 1 ? spares - 1 : 0)); /* the first took the hole at the mark */
        ndm_i_room rooms[8];
        ndm_i_before was;
        for (uint64_t i = 0; i < 8; i++)
            rooms[i] = (ndm_i_room){.size = 1};
        extents->node_room = extents->node_count = MEMBER;
        const int status = ndm_i_take(region, rooms, 8, &was);
        CHECK(spare == extents->spare_count && extents->node_count == MEMBER);
        extents->node_room = room;
        extents->node_count = count;
        CHECK(status == NDM_ERR_MEMORY && (rooms[0].extent == NDM_I_NONE) == (spare == 0));
        check_picture(region, &before);
        close_region(region);
    }
}

/* ---- values --------------------------------------------------------------------------------------------- */

static void test_enter(void)
{
    ndm_region *region = open_region(4 * KIB, 64 * KIB);
    const ndm_i_header *header = ndm_i_slots_header(&region->slots);
    ndm_i_room rooms[3] = {{.size = 100}, {.size = 0}, {.size = 5000}};
    ndm_i_before was;
    int64_t slots[3];
    CHECK(ndm_i_take(region, rooms, 3, &was) == NDM_OK && region->data.capacity > was.capacity);
    CHECK(region->growths == 0);
    CHECK(ndm_i_store_put(&region->store, rooms[0].offset, bytes, 100, rooms[0].vacant) == NDM_OK);
    CHECK(ndm_i_store_put(&region->store, rooms[2].offset, bytes, 5000, rooms[2].vacant) == NDM_OK);
    ndm_i_enter_values(region, rooms, 3, was, 9, NDM_I_DRAFT, slots);
    CHECK(region->growths == 1 && region->live_bytes == 5100 && region->used_bytes == 128 + 5000);
    CHECK(region->engine_bytes[9] == 5100 && region->engine_slots[9] == 3 && region->slots.live == 3);
    CHECK(ndm_i_word(&header->live_bytes) == 5100 && ndm_i_word(&header->used_bytes) == 5128);
    CHECK(ndm_i_word(&header->capacity) == region->data.capacity);
    for (int i = 0; i < 3; i++) {
        const ndm_i_record *record = ndm_i_live_record(region, slots[i]);
        CHECK(record && ndm_i_record_state(record) == NDM_I_DRAFT && ndm_i_record_engine(record) == 9);
        CHECK(ndm_i_record_offset(record) == rooms[i].offset && ndm_i_record_size(record) == rooms[i].size);
        CHECK(ndm_i_record_link(record) == rooms[i].extent);
        CHECK(i == 1 || ndm_i_extents_tag(&region->extents, rooms[i].extent) == slots[i]);
    }
    for (int i = 0; i < 3; i++)
        ndm_i_remove_value(region, (uint32_t)slots[i]);
    CHECK(region->live_bytes == 0 && region->engine_bytes[9] == 0 && region->engine_slots[9] == 0);
    CHECK(ndm_i_word(&header->live_bytes) == 0 && region->used_bytes == 5128);
    CHECK(region->extents.free_units == region->extents.mark && region->limbo.units == 0);
    close_region(region);
}

static uint64_t published_limbo(const ndm_region *region)
{
    return ndm_i_word(&ndm_i_slots_header(&region->slots)->pinned_bytes);
}

/* What a view keeps is in limbo until the view ends. */
static void test_viewed(void)
{
    ndm_region *region = open_region(64 * KIB, 64 * KIB);
    uint64_t size;
    const int64_t slot = write_value(region, 1000), other = write_value(region, 64);
    const char *view = ndm_region_read(region, slot, &size), *second = ndm_region_read(region, slot, &size);
    CHECK(view && view == second);
    ndm_i_remove_value(region, (uint32_t)slot);
    ndm_i_remove_value(region, (uint32_t)other); /* nothing keeps that one */
    CHECK(region->limbo.units == 16 && published_limbo(region) == 1024 && region->extents.free_units == 1);
    CHECK(ndm_region_check(region) == 0);
    ndm_view_release(view);
    CHECK(ndm_i_enter(region) == NDM_OK && region->limbo.units == 16);
    ndm_view_release(second);
    CHECK(region->limbo.units == 16); /* not before the owner comes by */
    CHECK(ndm_i_enter(region) == NDM_OK && region->limbo.units == 0 && published_limbo(region) == 0);
    CHECK(region->extents.free_units == 17 && region->extents.free_count == 1);
    close_region(region);
}

/* How many invariants are broken when limbo has been settled. */
static int64_t settled(ndm_region *region)
{
    CHECK(ndm_region_check(region) == 0); /* and before */
    ndm_i_settle(region);
    return ndm_region_check(region);
}

/* A reader of the region's leases, which are in memory. */
static void join(ndm_region *region, ndm_i_leases *reader)
{
    char path[64];
    if (!ndm_i_leases_are_open(&region->leases)) {
        CHECK(ndm_i_leases_start(&region->leases, NULL) == NDM_OK);
        region->leases.incarnation = ndm_i_word(&ndm_i_slots_header(&region->slots)->incarnation);
    }
    snprintf(path, sizeof path, "/proc/self/fd/%d", region->leases.file.fd);
    CHECK(ndm_i_leases_join(reader, path, false) == NDM_OK);
    reader->incarnation = region->leases.incarnation;
}

static int64_t lease(const ndm_region *region, ndm_i_leases *reader, int64_t slot)
{
    const ndm_i_record *record = ndm_i_live_record(region, slot);
    CHECK(record);
    const int64_t entry =
        ndm_i_leases_claim(reader, (uint32_t)slot, ndm_i_record_generation(record),
                           (ndm_i_span){ndm_i_record_offset(record), ndm_i_record_size(record)});
    CHECK(entry >= 0);
    return entry;
}

/* What a lease keeps, with a view or without one, comes home when both have ended. */
static void test_leased(void)
{
    static ndm_i_leases reader;
    ndm_region *region = open_region(64 * KIB, 64 * KIB);
    uint64_t size;
    const int64_t slot = write_value(region, 1000), viewed = write_value(region, 64), free_one = write_value(region, 64);
    join(region, &reader);
    const int64_t first = lease(region, &reader, slot), second = lease(region, &reader, viewed);
    const char *view = ndm_region_read(region, viewed, &size);
    CHECK(view);
    ndm_i_remove_value(region, (uint32_t)slot);
    ndm_i_remove_value(region, (uint32_t)viewed);
    ndm_i_remove_value(region, (uint32_t)free_one); /* others' leases do not keep it */
    CHECK(region->limbo.units == 0 && region->limbo.waiting_count == 3 && published_limbo(region) == 18 * 64);
    CHECK(settled(region) == 0 && region->limbo.units == 17 && region->limbo.waiting_count == 0);
    CHECK(published_limbo(region) == 17 * 64 && region->extents.free_units == 1);
    ndm_i_leases_release(&reader, (uint64_t)second);
    CHECK(settled(region) == 0 && region->limbo.units == 17); /* the view keeps it */
    ndm_view_release(view);
    CHECK(settled(region) == 0 && region->limbo.units == 16);
    ndm_i_leases_release(&reader, (uint64_t)first);
    CHECK(settled(region) == 0 && region->limbo.units == 0 && !region->limbo.leased);
    CHECK(published_limbo(region) == 0 && region->extents.free_units == 18);
    ndm_i_leases_close(&reader);
    close_region(region);
}

/* Where the file would have to grow, what the dead have leased comes home first; what the living have does not. */
static void test_dead(void)
{
    static ndm_i_leases living, dying;
    ndm_region *region = open_region(64 * KIB, 64 * KIB);
    const int64_t slots[] = {write_value(region, 24 * KIB), write_value(region, 24 * KIB), write_value(region, 64)};
    join(region, &living);
    join(region, &dying);
    lease(region, &dying, slots[0]);
    const int64_t entry = lease(region, &living, slots[1]);
    ndm_i_remove_value(region, (uint32_t)slots[0]);
    ndm_i_remove_value(region, (uint32_t)slots[1]);
    CHECK(settled(region) == 0 && region->limbo.units == 48 * KIB / 64);
    take_fails(region, (uint64_t[]){64, 20 * KIB}, 2, NDM_ERR_CAPACITY);
    CHECK(region->limbo.units == 48 * KIB / 64);
    ndm_i_file_close(&dying.file, NULL); /* as when its process ends */
    CHECK(ndm_region_check(region) == 0 && region->limbo.units == 48 * KIB / 64); /* the owner has not looked */
    ndm_i_room rooms[] = {{.size = 64}, {.size = 20 * KIB}, {.size = 1}};
    ndm_i_before was;
    CHECK(ndm_i_take(region, rooms, 3, &was) == NDM_OK && was.mark == region->extents.mark);
    CHECK(region->limbo.units == 24 * KIB / 64 && published_limbo(region) == 24 * KIB);
    CHECK(rooms[1].offset < 24 * KIB && region->growths == 0);
    ndm_i_undo(region, rooms, 3, was);
    CHECK(ndm_region_check(region) == 0);
    take_fails(region, (uint64_t[]){20 * KIB, 20 * KIB}, 2, NDM_ERR_CAPACITY);
    ndm_i_leases_release(&living, (uint64_t)entry);
    CHECK(write_value(region, 48 * KIB) >= 0);
    ndm_i_leases_close(&living);
    close_region(region);
}

/* Values that were freed wait, where readers may lease, until many are there, or much, or the file would have to grow. */
static void test_waiting(void)
{
    static ndm_i_leases reader;
    ndm_region *region = open_region(1024 * KIB, 8192 * KIB);
    int64_t slots[2 * NDM_I_WAITING];
    for (uint64_t i = 0; i < 2 * NDM_I_WAITING; i++)
        slots[i] = write_value(region, 64);
    join(region, &reader);
    const int64_t entry = lease(region, &reader, slots[3]);
    for (uint64_t i = 0; i + 1 < NDM_I_WAITING; i++)
        ndm_i_remove_value(region, (uint32_t)slots[i]);
    CHECK(region->limbo.waiting_count == NDM_I_WAITING - 1 && region->extents.free_units == 0);
    CHECK(ndm_region_check(region) == 0 && published_limbo(region) == 64 * (NDM_I_WAITING - 1));
    ndm_i_remove_value(region, (uint32_t)slots[NDM_I_WAITING - 1]);
    CHECK(region->limbo.waiting_count == 0 && region->limbo.units == 1 && published_limbo(region) == 64);
    CHECK(ndm_region_check(region) == 0 && region->extents.free_units == NDM_I_WAITING - 1);

    /* A lease that has ended is noticed in some verbs' time. */
    ndm_i_leases_release(&reader, (uint64_t)entry);
    int verbs = 0;
    while (region->limbo.leased && verbs++ <= 2 * NDM_I_WAITING)
        CHECK(ndm_i_enter(region) == NDM_OK);
    CHECK(verbs <= 2 * NDM_I_WAITING && region->limbo.units == 0 && published_limbo(region) == 0);

    /* Large ones do not wait, and what waits is room where the file would have to grow. */
    const int64_t large = write_value(region, NDM_I_WAITING_BYTES);
    ndm_i_remove_value(region, (uint32_t)slots[NDM_I_WAITING]);
    ndm_i_remove_value(region, (uint32_t)large);
    CHECK(region->limbo.waiting_count == 0 && ndm_region_check(region) == 0);
    const int64_t half = write_value(region, 128 * KIB);
    CHECK(write_value(region, 1024 * KIB - ndm_i_bytes(region, region->extents.mark)) >= 0);
    CHECK(write_value(region, 128 * KIB) >= 0); /* the rest of the large one's */
    ndm_i_remove_value(region, (uint32_t)half);
    CHECK(region->limbo.waiting_count == 1 && region->data.capacity == 1024 * KIB);
    CHECK(write_value(region, 128 * KIB) >= 0 && region->limbo.waiting_count == 0);
    CHECK(region->data.capacity == 1024 * KIB && region->growths == 0 && ndm_region_check(region) == 0);
    ndm_i_leases_close(&reader);
    close_region(region);
}

/* ---- moves ---------------------------------------------------------------------------------------------- */

static void test_moves(void)
{
    ndm_region *region = open_region(64 * KIB, 64 * KIB);
    const int64_t slots[] = {write_value(region, 64), write_value(region, 128), write_value(region, 60)};
    ndm_i_remove_value(region, (uint32_t)slots[0]);

    /* The last one, into the hole at the start. */
    const ndm_i_record *last = ndm_i_live_record(region, slots[2]), *middle = ndm_i_live_record(region, slots[1]);
    CHECK(ndm_i_extents_reserve(&region->extents));
    const ndm_i_place place = ndm_i_extents_find(&region->extents, 1);
    ndm_i_slots_move_begin(&region->slots, (uint32_t)slots[2], 0);
    ndm_i_value_moved(region, ndm_i_record_link(last), place);
    CHECK(ndm_i_record_offset(last) == 0 && ndm_i_record_state(last) == NDM_I_LIVE);
    CHECK(ndm_i_extents_tag(&region->extents, ndm_i_record_link(last)) == slots[2]);
    CHECK(ndm_region_check(region) == 0 && region->extents.free_units == 1);

    /* The middle one, into the hole before it, which is larger than none and smaller than the value. */
    ndm_i_remove_value(region, (uint32_t)slots[2]);
    const uint32_t hole = ndm_i_extents_first_hole(&region->extents);
    ndm_i_slots_move_begin(&region->slots, (uint32_t)slots[1], 0);
    const uint32_t behind = ndm_i_value_slid(region, hole);
    CHECK(ndm_i_record_offset(middle) == 0 && ndm_i_record_state(middle) == NDM_I_LIVE);
    CHECK(ndm_i_extents_tag(&region->extents, ndm_i_record_link(middle)) == slots[1]);
    CHECK(ndm_i_extents_offset(&region->extents, behind) == 2 && ndm_i_extents_length(&region->extents, behind) == 2);
    close_region(region);
}

/* ---- recovery ------------------------------------------------------------------------------------------- */

static void test_adopt(void)
{
    static ndm_i_leases reader;
    ndm_region *region = open_region(2048 * KIB, 2048 * KIB);
    const struct {
        uint64_t offset, size;
    } values[] = {{128, 100}, {256, 64}, {0, 0}, {600 * KIB, 600 * KIB}};
    join(region, &reader);
    CHECK(ndm_i_slots_reserve(&region->slots, 4) == NDM_OK);
    for (uint32_t i = 0; i < 4; i++) {
        CHECK(ndm_i_slots_add(&region->slots, values[i].offset, values[i].size, 4, NDM_I_NONE, NDM_I_LIVE) == i);
        CHECK(ndm_i_adopt(region, values[i].offset, values[i].size, i) == NDM_OK);
    }
    CHECK(ndm_region_check(region) == 0 && region->extents.mark == 1200 * KIB / 64);
    CHECK(region->live_bytes == 164 + 600 * KIB && region->engine_slots[4] == 4);
    CHECK(region->used_bytes == 1200 * KIB && region->extents.free_count == 2);
    CHECK(ndm_i_extents_is_free(&region->extents, ndm_i_extents_first(&region->extents)));
    CHECK(ndm_i_grains_have(&region->store.grains, 0, 1200 * KIB, NDM_I_PARTIAL));
    CHECK(!ndm_i_grains_have(&region->store.grains, 0, 1200 * KIB, NDM_I_EMPTY));

    /* Bytes that a reader has leased of a time before: no slot is theirs, and any lease of them keeps them. */
    const int64_t entry = ndm_i_leases_claim(&reader, 77, 5, (ndm_i_span){1300 * KIB + 10, 20});
    CHECK(entry >= 0 && ndm_i_adopt(region, 1300 * KIB, 100, NDM_I_NO_SLOT) == NDM_OK);
    CHECK(region->limbo.units == 2 && region->used_bytes == 1300 * KIB + 100 && region->live_bytes == 164 + 600 * KIB);
    const int64_t elsewhere = ndm_i_leases_claim(&reader, 78, 5, (ndm_i_span){1400 * KIB, 20});
    CHECK(elsewhere >= 0);
    ndm_i_leases_release(&reader, (uint64_t)elsewhere); /* has the owner look; but these bytes are leased still */
    CHECK(settled(region) == 0 && region->limbo.units == 2);
    ndm_i_leases_release(&reader, (uint64_t)entry);
    CHECK(settled(region) == 0 && region->limbo.units == 0);
    for (uint32_t i = 0; i < 4; i++)
        CHECK(ndm_region_free(region, i) == NDM_OK);
    CHECK(settled(region) == 0 && region->extents.free_units == region->extents.mark && region->extents.free_count == 1);
    ndm_i_leases_close(&reader);
    close_region(region);
}

/* ---- the checker ---------------------------------------------------------------------------------------- */

static void expect_damage(ndm_region *region, uint64_t *figure, uint64_t wrong)
{
    const uint64_t sound = *figure;
    *figure = wrong;
    CHECK(ndm_region_check(region) > 0);
    *figure = sound;
    CHECK(ndm_region_check(region) == 0);
}

static void test_damage(void)
{
    ndm_region *region = open_region(64 * KIB, 128 * KIB);
    uint64_t size;
    make_holes(region);
    const int64_t slot = write_value(region, 100), empty = write_value(region, 0), freed = write_value(region, 640);
    const char *view = ndm_region_read(region, freed, &size);
    CHECK(view && ndm_region_free(region, freed) == NDM_OK && region->limbo.units == 10);
    CHECK(ndm_region_check(region) == 0);
    expect_damage(region, &region->live_bytes, region->live_bytes + 1);
    expect_damage(region, &region->engine_bytes[1], 0);
    expect_damage(region, &region->engine_slots[1], region->engine_slots[1] - 1);
    expect_damage(region, &region->used_bytes, 64);
    expect_damage(region, &region->used_bytes, region->used_bytes + 4 * KIB);
    expect_damage(region, &region->limbo.units, 9);
    expect_damage(region, &region->limbo.units, 0);
    expect_damage(region, &region->data.capacity, 256 * KIB);
    expect_damage(region, &region->store.allocated, region->data.capacity + 1);

    /* A tag, a link, an offset of another; a value in a grain that has no blocks; a pin of what is free. */
    ndm_i_record *record = ndm_i_slots_record(&region->slots, slot);
    const uint32_t extent = ndm_i_record_link(record);
    ndm_i_extents_set_tag(&region->extents, extent, (uint32_t)empty);
    CHECK(ndm_region_check(region) > 0);
    ndm_i_extents_set_tag(&region->extents, extent, NDM_I_NONE);
    CHECK(ndm_region_check(region) > 0);
    ndm_i_extents_set_tag(&region->extents, extent, (uint32_t)slot);
    ndm_i_slots_set_extent(&region->slots, (uint32_t)slot, extent + 1);
    CHECK(ndm_region_check(region) > 0);
    ndm_i_slots_set_extent(&region->slots, (uint32_t)slot, extent);
    const uint64_t place = ndm_i_word(&record->place);
    atomic_store(&record->place, place + 64);
    CHECK(ndm_region_check(region) > 0);
    atomic_store(&record->place, place);
    CHECK(ndm_region_check(region) == 0);
    const uint8_t state = ndm_i_grain_state(&region->store.grains, 0);
    for (uint8_t none = NDM_I_EMPTY; none <= NDM_I_HOLE; none++) {
        ndm_i_grain_set_state(&region->store.grains, 0, none);
        CHECK(ndm_region_check(region) > 0);
    }
    ndm_i_grain_set_state(&region->store.grains, 0, state);
    ndm_i_mapping *mapping = region->data.mapping;
    const uint32_t hole = ndm_i_extents_first_hole(&region->extents);
    CHECK(ndm_i_pin(region, hole, mapping, mapping->base + 32 * KIB, 1, false) == NDM_OK);
    CHECK(ndm_region_check(region) == 1);
    ndm_view_release((char *)mapping->base + 32 * KIB);
    CHECK(ndm_i_pin(region, extent, mapping, mapping->base + 32 * KIB, 1, false) == NDM_OK);
    CHECK(ndm_region_check(region) == 0 && ndm_i_pins_orphan(&region->home, extent));
    CHECK(ndm_region_check(region) == 1); /* an orphan that is a live value's */
    CHECK(ndm_region_free(region, empty) == NDM_OK);
    ndm_i_extents_set_tag(&region->extents, extent, NDM_I_NONE); /* make it one that was freed, as orphans are */
    region->limbo.units += 2;
    region->live_bytes -= 100, region->engine_bytes[1] -= 100, region->engine_slots[1]--;
    ndm_i_slots_remove(&region->slots, (uint32_t)slot);
    CHECK(ndm_region_check(region) == 0);
    ndm_view_release((char *)mapping->base + 32 * KIB);
    ndm_view_release(view);
    CHECK(ndm_region_check(region) == 0 && region->limbo.units == 0);
    close_region(region);
}

int main(int argc, char **argv)
{
    if (argc > 1)
        directory = argv[1];
    else if (getenv("TMPDIR"))
        directory = getenv("TMPDIR");
    test_undo();
    test_undo_stored();
    test_ceiling();
    test_file_size();
    test_memory();
    test_enter();
    test_viewed();
    test_leased();
    test_dead();
    test_waiting();
    test_moves();
    test_adopt();
    test_damage();
    puts("ledger: undo, undo stored, ceiling, file size, memory, enter, viewed, leased, dead, waiting, moves, adopt, damage: ok");
    return 0;
}
