/* What others may do to a region of many threads while a verb has let them in, at the very moment that harms most. "Others" are
 * a function that is called when the verb comes back: the lock is free then.
 *
 * usage: test_let_in [directory]: it should be on a disk, whose file system keeps blocks. */
#define _GNU_SOURCE
#include "check.h"
#include "region/ledger.h"

#include <errno.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

enum { KIB = 1024, MIB = 1024 * KIB };

static char path[4096];
static ndm_region *region;
static uint8_t bytes[2 * MIB];

static void (*others)(void); /* to be called once, when a verb that let others in comes back */
static bool disk_fails, disk_is_slow, table_is_full, growth_is_watched;

void __real_ndm_i_gate_come_back(ndm_i_gate *gate, bool let);
void __wrap_ndm_i_gate_come_back(ndm_i_gate *gate, bool let);
ssize_t __real_pwritev(int fd, const struct iovec *parts, int count, off_t offset);
ssize_t __wrap_pwritev(int fd, const struct iovec *parts, int count, off_t offset);
int __real_sync_file_range(int fd, off_t offset, off_t count, unsigned flags);
int __wrap_sync_file_range(int fd, off_t offset, off_t count, unsigned flags);
int __real_ndm_i_slots_reserve(ndm_i_slots *slots, uint64_t count);
int __wrap_ndm_i_slots_reserve(ndm_i_slots *slots, uint64_t count);

void __wrap_ndm_i_gate_come_back(ndm_i_gate *gate, bool let)
{
    void (*const now)(void) = let ? others : NULL;
    if (now) {
        others = NULL;
        now();
    }
    __real_ndm_i_gate_come_back(gate, let);
}

ssize_t __wrap_pwritev(int fd, const struct iovec *parts, int count, off_t offset)
{
    if (!disk_fails)
        return __real_pwritev(fd, parts, count, offset);
    errno = EIO;
    return -1;
}

int __wrap_sync_file_range(int fd, off_t offset, off_t count, unsigned flags)
{
    if (disk_is_slow)
        usleep(20000);
    return __real_sync_file_range(fd, offset, count, flags);
}

int __wrap_ndm_i_slots_reserve(ndm_i_slots *slots, uint64_t count)
{
    return table_is_full ? NDM_ERR_IO : __real_ndm_i_slots_reserve(slots, count);
}

static void open_region(uint64_t initial, uint64_t limit)
{
    const ndm_options options = {.initial_capacity = initial,
                                 .max_capacity = 64 * MIB,
                                 .alignment = 64,
                                 .cache_limit = limit,
                                 .ownership = NDM_OWNED_BY_PROCESS};
    CHECK((region = ndm_region_open(path, &options)));
}

static void close_region(void)
{
    CHECK(!others); /* they were in */
    CHECK(ndm_region_check(region) == 0);
    CHECK(ndm_region_close(region) == NDM_OK);
    ndm_region_destroy(region);
    char slots[sizeof path + 8];
    snprintf(slots, sizeof slots, "%s.slots", path);
    unlink(slots);
    unlink(path);
}

static int64_t write_value(uint64_t size)
{
    const int64_t slot = ndm_region_write(region, bytes, size, 0);
    CHECK(slot >= 0);
    return slot;
}

/* Bytes of a grain that have blocks. */
static uint64_t blocks_of(uint64_t grain)
{
    const uint64_t start = grain * NDM_I_GRAIN, end = start + NDM_I_GRAIN;
    union {
        struct fiemap map;
        char room[sizeof(struct fiemap) + 128 * sizeof(struct fiemap_extent)];
    } found = {.map = {.fm_start = start, .fm_length = NDM_I_GRAIN, .fm_extent_count = 128}};
    CHECK(ioctl(region->data.fd, FS_IOC_FIEMAP, &found) == 0);
    uint64_t total = 0;
    for (unsigned i = 0; i < found.map.fm_mapped_extents; i++) {
        const struct fiemap_extent *extent = &found.map.fm_extents[i];
        total += ndm_i_min(extent->fe_logical + extent->fe_length, end) - ndm_i_max(extent->fe_logical, start);
    }
    return total;
}

int __real_ftruncate(int fd, off_t size);
int __wrap_ftruncate(int fd, off_t size);

int __wrap_ftruncate(int fd, off_t size)
{
    const int status = __real_ftruncate(fd, size);
    if (growth_is_watched && fd == region->data.fd)
        CHECK(blocks_of(0) == NDM_I_GRAIN);
    growth_is_watched = growth_is_watched && fd != region->data.fd;
    return status;
}

static void check_blocks(void)
{
    for (uint64_t grain = 0; grain < region->data.capacity / NDM_I_GRAIN; grain++)
        CHECK(ndm_i_grain_state(&region->store.grains, grain) < NDM_I_READY || blocks_of(grain) == NDM_I_GRAIN);
}

static void trim(void) { CHECK(ndm_region_trim(region) >= 0); }

/* ---- a large value is being written --------------------------------------------------------------------- */

/* Beside it a hole loses its blocks. */
static void test_blocks_go_while_a_value_is_written(void)
{
    open_region(8 * MIB, UINT64_MAX);
    const int64_t first = write_value(200 * KIB);
    write_value(100 * KIB);
    const int64_t third = write_value(212 * KIB); /* up to the end of the grain */
    write_value(100 * KIB);
    ndm_region_free(region, first);
    ndm_region_free(region, third);
    others = trim;
    write_value(205 * KIB);
    check_blocks();
    close_region();
}

/* ---- a small value is being stored ---------------------------------------------------------------------- */

static uint64_t newest_grain(void) { return (ndm_i_bytes(region, region->extents.mark) - 1) / NDM_I_GRAIN; }

static void protect(int protection)
{
    const uint64_t grain = newest_grain();
    CHECK(mprotect(region->data.mapping->base + grain * NDM_I_GRAIN, NDM_I_GRAIN, protection) == 0);
}

/* A store to a grain that lacks blocks is SIGBUS if the disk is full. Here it is SIGSEGV. */
static void trim_and_protect(void)
{
    trim();
    if (ndm_i_grain_state(&region->store.grains, newest_grain()) < NDM_I_READY)
        protect(PROT_READ);
}

static void test_blocks_go_before_a_value_is_stored(void)
{
    open_region(64 * MIB, 4 * MIB);
    disk_is_slow = true;
    others = trim_and_protect;
    for (int i = 0; i < 1000 && others; i++)
        write_value(60 * KIB);
    protect(PROT_READ | PROT_WRITE);
    disk_is_slow = false;
    check_blocks();
    close_region();
}

static void test_blocks_go_before_a_view_is_stored_to(void)
{
    open_region(64 * MIB, 4 * MIB);
    disk_is_slow = true;
    others = trim;
    for (int i = 0; i < 1000 && others; i++) {
        char *view;
        const int64_t slot = ndm_region_allocate(region, 100 * KIB, 0, &view);
        ndm_slot place;
        CHECK(slot >= 0 && ndm_region_slot(region, slot, &place) == NDM_OK);
        const uint64_t last = (place.offset + place.size - 1) / NDM_I_GRAIN;
        for (uint64_t grain = place.offset / NDM_I_GRAIN; grain <= last; grain++)
            CHECK(ndm_i_grain_state(&region->store.grains, grain) >= NDM_I_READY);
        check_blocks();
        memset(view, 1, 100 * KIB);
        CHECK(ndm_region_commit(region, slot) == NDM_OK);
        ndm_view_release(view);
    }
    disk_is_slow = false;
    close_region();
}

static void fill_table(void) { table_is_full = true; }

/* Others have taken the slots, and there are no more: the view that was pinned ends. */
static void test_no_slot_is_left_for_a_view(void)
{
    open_region(64 * MIB, 4 * MIB);
    disk_is_slow = true;
    others = fill_table;
    int64_t slot = 0;
    for (int i = 0; i < 1000 && slot >= 0; i++) {
        char *view;
        if ((slot = ndm_region_allocate(region, 100 * KIB, 0, &view)) >= 0)
            ndm_view_release(view);
    }
    disk_is_slow = table_is_full = false;
    CHECK(slot == NDM_ERR_IO && !ndm_i_pins_any(&region->home));
    close_region();
}

/* ---- a value could not be written ----------------------------------------------------------------------- */

static ndm_reader *reader;

static void write_beyond_and_free(void)
{
    disk_fails = false;
    const int64_t slot = write_value(100 * KIB);
    char slots[sizeof path + 8];
    snprintf(slots, sizeof slots, "%s.slots", path);
    CHECK((reader = ndm_reader_open(path, slots, "")));
    CHECK(ndm_region_free(region, slot) == NDM_OK);
}

static void write_beyond_free_and_trim(void)
{
    write_beyond_and_free();
    trim();
}

/* Whoever reads from the end of the file must not find it cut off. */
static void test_readers_keep_what_a_failed_write_grew(void)
{
    open_region(MIB, UINT64_MAX);
    others = write_beyond_free_and_trim;
    disk_fails = true;
    CHECK(ndm_region_write(region, bytes, MIB + MIB / 2, 0) == NDM_ERR_IO);
    CHECK(region->data.capacity > MIB);
    ndm_reader_destroy(reader);
    trim();
    CHECK(region->data.capacity == MIB);
    close_region();
}

/* Others have been there. */
static void test_the_mark_stays_where_others_have_been(void)
{
    open_region(MIB, UINT64_MAX);
    others = write_beyond_and_free;
    disk_fails = true;
    CHECK(ndm_region_write(region, bytes, MIB + MIB / 2, 0) == NDM_ERR_IO);
    CHECK(region->used_bytes == MIB + MIB / 2 + 100 * KIB);
    CHECK(ndm_region_check(region) == 0);
    ndm_reader_destroy(reader);
    close_region();
}

/* Two that came in fail, the first to come first: a hole is left above all that was ever a value's. */
static void fail_twice(void)
{
    ndm_i_room rooms[2] = {{.size = 100 * KIB}, {.size = 100 * KIB}};
    ndm_i_before before[2];
    CHECK(ndm_i_enter(region) == NDM_OK);
    for (int i = 0; i < 2; i++)
        CHECK(ndm_i_take(region, &rooms[i], 1, &before[i]) == NDM_OK);
    for (int i = 0; i < 2; i++)
        ndm_i_undo(region, &rooms[i], 1, before[i]);
    ndm_i_leave(&region);
    ndm_stats stats;
    CHECK(ndm_region_stats(region, &stats) == NDM_OK);
    CHECK(stats.free_bytes == 0 && stats.largest_free_bytes == 0);
}

static void test_figures_of_room_that_was_given_back(void)
{
    open_region(8 * MIB, UINT64_MAX);
    others = fail_twice;
    write_value(MIB);
    close_region();
}

/* The end of the file cuts the grain of a view, and other threads store to it as soon as the file is longer. */
static void test_growth_beside_a_view(void)
{
    open_region(100 * KIB, UINT64_MAX);
    char *view;
    CHECK(ndm_region_allocate(region, 50 * KIB, 0, &view) >= 0);
    growth_is_watched = true;
    write_value(900 * KIB);
    CHECK(!growth_is_watched);
    ndm_view_release(view);
    close_region();
}

static void grow(void) { write_value(2 * MIB); }

static void test_each_growth_is_counted_once(void)
{
    ndm_stats stats;
    open_region(MIB, UINT64_MAX);
    others = grow;
    write_value(MIB / 2);
    CHECK(ndm_region_stats(region, &stats) == NDM_OK && stats.growths == 1);
    close_region();
}

int main(int count, char **arguments)
{
    snprintf(path, sizeof path, "%s/let-in-%d", count > 1 ? arguments[1] : ".", (int)getpid());
    memset(bytes, 7, sizeof bytes);
    open_region(MIB, UINT64_MAX);
    const bool keeps_blocks = region->data.keeps_blocks && !region->data.in_memory;
    close_region();
    if (keeps_blocks) {
        test_blocks_go_while_a_value_is_written();
        test_blocks_go_before_a_value_is_stored();
        test_blocks_go_before_a_view_is_stored_to();
        test_no_slot_is_left_for_a_view();
        test_growth_beside_a_view();
    }
    test_readers_keep_what_a_failed_write_grew();
    test_the_mark_stays_where_others_have_been();
    test_figures_of_room_that_was_given_back();
    test_each_growth_is_counted_once();
    return 0;
}
