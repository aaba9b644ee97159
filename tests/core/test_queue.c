/* The background writer by itself (test_writer.c drives whole regions): what is admitted and forgotten, in which order grains
 * are dropped, the limit, what settle() reports, and a checker that finds what is planted.
 *
 * usage: test_queue [directory]: it should be on a disk, for on tmpfs no writer runs, and most of this is left out. */
#define _GNU_SOURCE
#include "check.h"
#include "os/bytes.h"
#include "os/residency.h"
#include "store/writer.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#define GRAIN NDM_I_GRAIN

enum { COUNT = 64 }; /* grains of the file */

static const char *directory = ".";
static char path[256];
static ndm_i_file file;
static ndm_i_grains grains;
static ndm_i_writer writer;
static const _Atomic uint64_t storing;

static void start(uint64_t limit)
{
    CHECK(ndm_i_file_open(&file, path, true, NDM_I_LOCK_FILE) == NDM_OK);
    CHECK(ndm_i_file_start(&file, COUNT * GRAIN, COUNT * GRAIN) == NDM_OK);
    CHECK(ndm_i_grains_reserve(&grains, COUNT));
    CHECK(ndm_i_writer_init(&writer, &file, &grains, &storing, limit) == NDM_OK);
    CHECK(ndm_i_writer_check(&writer) == 0);
}

static void stop(void)
{
    CHECK(ndm_i_writer_check(&writer) == 0);
    ndm_i_writer_fini(&writer);
    CHECK(!writer.queue && !ndm_i_writer_is_limited(&writer));
    ndm_i_writer_fini(&writer); /* nothing is left to end */
    ndm_i_grains_fini(&grains);
    ndm_i_file_close(&file, path);
}

static void admit(uint64_t first, uint64_t last)
{
    ndm_i_writer_admit(&writer, first, last);
    CHECK(ndm_i_writer_check(&writer) == 0);
}

static void forget(uint64_t first, uint64_t last)
{
    ndm_i_writer_lock(&writer);
    ndm_i_writer_forget(&writer, first, last);
    ndm_i_writer_unlock(&writer);
    CHECK(ndm_i_writer_check(&writer) == 0);
}

static bool is_queued(uint64_t grain) { return ndm_i_grain_is(&grains, grain, NDM_I_QUEUED); }

static uint32_t entry(uint64_t at) { return writer.queue[at & (writer.queue_room - 1)]; }

/* No limit, or a file in memory: nothing is kept. */
static void test_unlimited(void)
{
    start(NDM_I_UNLIMITED);
    admit(0, COUNT);
    CHECK(!ndm_i_writer_is_limited(&writer) && !writer.queue && !is_queued(0) && writer.resident == 0);
    CHECK(ndm_i_writer_settle(&writer, 0, COUNT * GRAIN, false) == 0);
    stop();
    start(COUNT * GRAIN);
    ndm_i_writer_fini(&writer);
    file.in_memory = true;
    CHECK(ndm_i_writer_init(&writer, &file, &grains, &storing, 0) == NDM_OK && !ndm_i_writer_is_limited(&writer));
    stop();
}

static void test_limits(void)
{
    const struct {
        uint64_t limit, grains;
    } cases[] = {{0, 8}, {8 * GRAIN, 8}, {9 * GRAIN - 1, 8}, {9 * GRAIN, 9}, {UINT64_MAX - 1, (UINT64_MAX - 1) / GRAIN}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        start(cases[i].limit);
        CHECK(writer.limit == cases[i].grains && !writer.running);
        stop();
    }
}

static void test_admit(void)
{
    start(2 * COUNT * GRAIN); /* half of it is never in use: no thread */
    admit(0, 3);
    admit(5, 6);
    admit(1, 3); /* known already */
    const uint32_t order[] = {0, 1, 2, 5};
    CHECK(writer.tail == 4 && writer.head == 0 && writer.resident == 4);
    for (uint64_t at = 0; at < 4; at++)
        CHECK(entry(at) == order[at] && is_queued(order[at]));
    CHECK(!is_queued(3) && !is_queued(4));

    ndm_i_grain_mark(&grains, 1, NDM_I_RECENT);
    forget(1, 5); /* grains 3 and 4 were not there */
    CHECK(writer.resident == 2 && writer.tail == 4 && !ndm_i_grain_is(&grains, 1, UINT8_MAX));
    admit(1, 2); /* comes anew, at the end; its old entry is stale */
    CHECK(writer.resident == 3 && writer.tail == 5 && entry(4) == 1);
    forget(0, COUNT);
    CHECK(writer.resident == 0);
    admit(3, 3); /* no grain at all */
    CHECK(writer.tail == 5 && !writer.running);
    stop();
}

/* The ring grows while it is wound around its end; the order stays. */
static void test_ring(void)
{
    enum { MANY = 700 };
    start(10 * MANY * GRAIN);
    CHECK(ndm_i_grains_reserve(&grains, MANY));
    const uint64_t room = writer.queue_room;
    writer.head = writer.kicked = writer.tail = room - 56;
    for (uint64_t i = 0; i < MANY; i++)
        ndm_i_writer_admit(&writer, MANY - 1 - i, MANY - i);
    CHECK(writer.queue_room > room && writer.queue_room >= MANY && writer.resident == MANY);
    for (uint64_t i = 0; i < MANY; i++)
        CHECK(entry(writer.head + i) == MANY - 1 - i);
    CHECK(ndm_i_writer_check(&writer) == 0 && !writer.running);
    stop();
}

/* ---- with a thread -------------------------------------------------------------------------------------- */

static uint8_t bytes[GRAIN];

static void write_grain(uint64_t grain)
{
    memset(bytes, (int)(grain + 1), GRAIN);
    CHECK(ndm_i_file_write(&file, bytes, GRAIN, grain * GRAIN) == 0);
    ndm_i_writer_lock(&writer);
    ndm_i_grain_set_state(&grains, grain, NDM_I_READY);
    ndm_i_writer_unlock(&writer);
    admit(grain, grain + 1);
    ndm_i_writer_lock(&writer);
    CHECK(writer.resident <= writer.limit);
    ndm_i_writer_unlock(&writer);
}

static void check_bytes(uint64_t count)
{
    for (uint64_t grain = 0; grain < count; grain++) {
        CHECK(ndm_i_file_load(&file, grain * GRAIN, bytes, GRAIN) == NDM_OK);
        for (uint64_t i = 0; i < GRAIN; i += 512)
            CHECK(bytes[i] == grain + 1);
    }
}

/* The oldest go first: what was dropped is the beginning of the file. */
static void test_limit(void)
{
    start(0);
    for (uint64_t grain = 0; grain < COUNT; grain++) {
        write_grain(grain);
        CHECK(grain > 3 || !writer.running); /* not before half the limit is in use */
    }
    CHECK(writer.running && atomic_load(&writer.drops) > 0 && atomic_load(&writer.error) == 0);
    ndm_i_writer_lock(&writer);
    CHECK(writer.written_back >= (COUNT - 8 - 2) * GRAIN && writer.written_back % GRAIN == 0);
    uint64_t dropped = 0;
    while (dropped < COUNT && ndm_i_grain_state(&grains, dropped) == NDM_I_DROPPED)
        CHECK(!is_queued(dropped++));
    CHECK(dropped >= COUNT - 8);
    for (uint64_t grain = dropped; grain < COUNT; grain++)
        CHECK(ndm_i_grain_state(&grains, grain) == NDM_I_READY && is_queued(grain));
    ndm_i_writer_unlock(&writer);
    check_bytes(COUNT);
    stop(); /* ends the thread */
}

/* A grain that was read since it was queued goes round once more. */
static void test_recent(void)
{
    start(0);
    for (uint64_t grain = 0; grain < 4; grain++)
        write_grain(grain);
    CHECK(!writer.running);
    ndm_i_grain_mark(&grains, 0, NDM_I_RECENT);
    for (uint64_t grain = 4; grain < 10; grain++)
        write_grain(grain);
    ndm_i_writer_lock(&writer);
    CHECK(is_queued(0) && !ndm_i_grain_is(&grains, 0, NDM_I_RECENT) && ndm_i_grain_state(&grains, 0) == NDM_I_READY);
    CHECK(!is_queued(1) && ndm_i_grain_state(&grains, 1) == NDM_I_DROPPED);
    ndm_i_writer_unlock(&writer);
    for (uint64_t grain = 10; grain < COUNT; grain++)
        write_grain(grain);
    ndm_i_writer_lock(&writer);
    CHECK(!is_queued(0) && ndm_i_grain_state(&grains, 0) == NDM_I_DROPPED);
    ndm_i_writer_unlock(&writer);
    check_bytes(COUNT);
    stop();
}

/* Stale entries are passed over: what was forgotten is neither dropped nor written back for it. */
static void test_stale(void)
{
    start(0);
    for (uint64_t grain = 0; grain < COUNT; grain++) {
        write_grain(grain);
        if (grain % 4 < 2)
            continue;
        ndm_i_writer_lock(&writer);
        if (is_queued(grain)) {
            ndm_i_writer_forget(&writer, grain, grain + 1);
            ndm_i_grain_set_state(&grains, grain, NDM_I_BEGUN);
        }
        ndm_i_writer_unlock(&writer);
    }
    ndm_i_writer_lock(&writer);
    uint64_t kept = 0;
    for (uint64_t grain = 0; grain < COUNT; grain++)
        if (ndm_i_grain_state(&grains, grain) == NDM_I_BEGUN) {
            CHECK(!is_queued(grain));
            kept++;
        }
    CHECK(kept >= COUNT / 2 - 8); /* the newest are never dropped before the owner gets to them */
    CHECK(ndm_i_grain_state(&grains, 0) == NDM_I_DROPPED && ndm_i_grain_state(&grains, 1) == NDM_I_DROPPED);
    ndm_i_writer_unlock(&writer);
    check_bytes(COUNT);
    stop();
}

/* ---- settling ------------------------------------------------------------------------------------------- */

static void test_settle(void)
{
    uint64_t resident, unwritten;
    start(2 * COUNT * GRAIN);
    for (uint64_t grain = 0; grain < 8; grain++)
        write_grain(grain);
    CHECK(ndm_i_writer_settle(&writer, 0, 8 * GRAIN, false) == 0);
    CHECK(ndm_i_residency(&file, &resident, &unwritten) == NDM_OK && unwritten == 0);
    const bool counted = ndm_i_is_cached(&file, 0, 8 * GRAIN); /* where cachestat is known */
    CHECK(ndm_i_writer_settle(&writer, 0, 4 * GRAIN, true) == 0);
    if (counted) {
        CHECK(ndm_i_residency(&file, &resident, &unwritten) == NDM_OK && resident < 8 * GRAIN);
        CHECK(!ndm_i_is_cached(&file, 0, GRAIN));
    }
    CHECK(writer.resident == 8); /* who had it dropped says so by forget() */

    /* A failure that the thread has met: nothing is dropped, all is looked after, and it is reported once. */
    atomic_store(&writer.error, EIO);
    CHECK(ndm_i_writer_settle(&writer, 4 * GRAIN, 8 * GRAIN, true) == EIO);
    CHECK(atomic_load(&writer.error) == 0 && !writer.suspect);
    CHECK(ndm_i_writer_settle(&writer, 0, 8 * GRAIN, true) == 0);
    check_bytes(8);

    /* And as long as what is in RAM was not found on disk, each call looks for it. */
    writer.suspect = true;
    CHECK(ndm_i_writer_settle(&writer, 0, GRAIN, false) == 0 && !writer.suspect);
    check_bytes(8);
    stop();
}

/* While an error stands the owner is not made to wait, whatever is in RAM. */
static void test_error(void)
{
    start(0);
    atomic_store(&writer.error, ENOSPC);
    for (uint64_t grain = 0; grain < COUNT; grain++) {
        CHECK(ndm_i_file_write(&file, bytes, GRAIN, grain * GRAIN) == 0);
        admit(grain, grain + 1);
    }
    CHECK(writer.resident == COUNT && atomic_load(&writer.drops) == 0);
    CHECK(ndm_i_writer_settle(&writer, 0, COUNT * GRAIN, false) == ENOSPC);
    admit(0, 1); /* the thread works again, and the owner waits for it */
    ndm_i_writer_lock(&writer);
    CHECK(writer.resident <= writer.limit && atomic_load(&writer.drops) > 0);
    ndm_i_writer_unlock(&writer);
    stop();
}

/* ---- the checker ---------------------------------------------------------------------------------------- */

static void test_damage(void)
{
    start(2 * COUNT * GRAIN);
    admit(0, 6);
    const ndm_i_writer sound = writer;
    const struct {
        uint64_t head, kicked, tail, room, resident;
    } cases[] = {
        {1, 0, 6, 256, 6},   /* head past kicked */
        {0, 7, 6, 256, 6},   /* kicked past tail */
        {0, 0, 6, 255, 6},   /* a ring that no mask fits */
        {0, 0, 6, 4, 6},     /* more in it than it holds */
        {1, 1, 6, 256, 6},   /* the entry of a queued grain is gone */
        {0, 0, 5, 256, 6},
        {0, 0, 6, 256, 5},   /* fewer counted than queued */
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        writer.head = cases[i].head;
        writer.kicked = cases[i].kicked;
        writer.tail = cases[i].tail;
        writer.queue_room = cases[i].room;
        writer.resident = cases[i].resident;
        CHECK(ndm_i_writer_check(&writer) > 0);
        writer.head = sound.head;
        writer.kicked = sound.kicked;
        writer.tail = sound.tail;
        writer.queue_room = sound.queue_room;
        writer.resident = sound.resident;
        CHECK(ndm_i_writer_check(&writer) == 0);
    }
    ndm_i_grain_mark(&grains, 20, NDM_I_QUEUED); /* a mark without an entry */
    CHECK(ndm_i_writer_check(&writer) > 0);
    writer.resident++;
    CHECK(ndm_i_writer_check(&writer) > 0);
    writer.resident--;
    ndm_i_grain_unmark(&grains, 20, NDM_I_QUEUED);
    writer.queue[3] = 2; /* an entry twice, and one not at all */
    CHECK(ndm_i_writer_check(&writer) > 0);
    writer.queue[3] = UINT32_MAX; /* of no grain */
    CHECK(ndm_i_writer_check(&writer) > 0);
    writer.queue[3] = 3;
    stop();
}

int main(int argc, char **argv)
{
    if (argc > 1)
        directory = argv[1];
    else if (getenv("TMPDIR"))
        directory = getenv("TMPDIR");
    snprintf(path, sizeof path, "%s/test-queue-%d", directory, getpid());
    if (ndm_path_in_memory(path)) {
        puts("queue: left out, the directory is in memory");
        return 0;
    }
    test_unlimited();
    test_limits();
    test_admit();
    test_ring();
    test_limit();
    test_recent();
    test_stale();
    test_settle();
    test_error();
    test_damage();
    puts("queue: unlimited, limits, admit, ring, limit, recent, stale, settle, error, damage: ok");
    return 0;
}
