/* A call that goes well leaves ndm_last_error() as it is, whatever it met on its way: files that are not there, slots that are
 * free, a system that refuses the first try. Each public function stands here (a test of the bindings sees to that). */
#define _GNU_SOURCE
#include "check.h"

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static char folder[] = "/var/tmp/test-last-error-XXXXXX";
static char path[64], slots_path[80], leases_path[80];
static int failed; /* calls that changed it */

/* The linker leads the core's calls here: longer mappings are refused once. */
static uint64_t longest = UINT64_MAX;

static bool is_refused(size_t length)
{
    const bool refused = length >= longest;
    if (refused) {
        longest = UINT64_MAX;
        errno = ENOMEM;
    }
    return refused;
}

void *__real_mmap(void *place, size_t length, int rights, int flags, int fd, off_t offset);
void *__wrap_mmap(void *place, size_t length, int rights, int flags, int fd, off_t offset);

void *__wrap_mmap(void *place, size_t length, int rights, int flags, int fd, off_t offset)
{
    const bool refused = fd >= 0 && is_refused(length);
    return refused ? MAP_FAILED : __real_mmap(place, length, rights, flags, fd, offset);
}

void *__real_mremap(void *old, size_t length, size_t wanted, int flags, void *place);
void *__wrap_mremap(void *old, size_t length, size_t wanted, int flags, void *place);

void *__wrap_mremap(void *old, size_t length, size_t wanted, int flags, void *place)
{
    return is_refused(wanted) ? MAP_FAILED : __real_mremap(old, length, wanted, flags, place);
}

static ndm_error mark(void)
{
    CHECK(ndm_check_abi(NDM_ABI_VERSION + 1, 0) == NDM_ERR_VERSION);
    return *ndm_last_error();
}

static bool is_marked(const ndm_error *marked)
{
    const ndm_error *now = ndm_last_error();
    return now->status == marked->status && now->message == marked->message && now->os_errno == marked->os_errno &&
           now->slot_known == marked->slot_known && now->file == marked->file && now->space_known == marked->space_known;
}

/* The call goes well, and changes nothing. */
#define KEEPS(call)                                                                                                    \
    do {                                                                                                               \
        const ndm_error marked = mark();                                                                               \
        const bool went_well = (call);                                                                                 \
        if (!went_well || !is_marked(&marked)) {                                                                       \
            fprintf(stderr, "%s:%d: %s %s; %s\n", __FILE__, __LINE__, #call,                                           \
                    went_well ? "changed the last error" : "failed", ndm_last_error()->message);                       \
            failed++;                                                                                                  \
        }                                                                                                              \
    } while (0)

/* The same of a function that returns nothing. */
#define KEEPS_VOID(call) KEEPS(((call), true))

static ndm_options options = {
    .initial_capacity = 1 << 20, .max_capacity = 4 << 20, .alignment = 64, .cache_limit = 8 << 20};
static char value[200 << 10];

static void test_opening(void)
{
    ndm_region *region = NULL;
    ndm_options wrong = options;
    KEEPS(ndm_version() && ndm_abi_version() == NDM_ABI_VERSION);
    KEEPS(ndm_check_abi(NDM_ABI_VERSION, NDM_VERSION_NUMBER) == NDM_OK);
    KEEPS(ndm_path_medium(path) >= 0 && ndm_path_in_memory(path) >= 0 && ndm_mappings_are_locked() >= 0);
    KEEPS((region = ndm_region_open(path, &options))); /* no file is there */
    KEEPS_VOID(ndm_region_destroy(region));
    KEEPS((region = ndm_region_open(path, &options))); /* a data file and a table */
    KEEPS(ndm_region_write(region, value, 100, 0) == 0);
    KEEPS(ndm_region_close(region) == NDM_OK && ndm_region_close(region) == NDM_OK && ndm_region_is_closed(region) == 1);
    KEEPS_VOID(ndm_region_destroy(region));
    wrong.recover = 1;
    KEEPS((region = ndm_region_open(path, &wrong)));
    KEEPS_VOID(ndm_region_destroy(region));
    wrong = options;
    wrong.initial_capacity = 0; /* nobody looks at it */
    KEEPS((region = ndm_region_open(path, &wrong)));
    KEEPS_VOID(ndm_region_destroy(region));
    CHECK(unlink(slots_path) == 0);
    KEEPS((region = ndm_region_open(path, &options)));
    KEEPS(ndm_region_allow_leases(region) == NDM_OK && ndm_region_allow_leases(region) == NDM_OK);
    KEEPS_VOID(ndm_region_destroy(region));
    CHECK(truncate(leases_path, 8) == 0); /* none any more */
    KEEPS((region = ndm_region_open(path, &options)));
    KEEPS_VOID(ndm_region_destroy(region));
    CHECK(unlink(leases_path) == 0);
    longest = 4 << 20; /* address space for the ceiling is refused */
    KEEPS((region = ndm_region_open(path, &options)));
    CHECK(longest == UINT64_MAX);
    KEEPS_VOID(ndm_region_destroy(region));
    KEEPS_VOID(ndm_region_destroy(NULL));
}

static void test_values(ndm_region *region)
{
    uint64_t size, sizes[2] = {100, 50};
    int64_t slots[2], lengths[2] = {60, 40}, slot;
    const void *parts[] = {value, value};
    const char *views[2], *view;
    char *place, buffer[200];
    ndm_slot shown;
    KEEPS(ndm_region_write(region, value, 100, 0) == 0 && ndm_region_write(region, NULL, 0, 0) == 1);
    KEEPS((slot = ndm_region_write_vectored(region, parts, sizes, 2, 1, 0)) == 2);
    KEEPS((slot = ndm_region_allocate(region, 100, 0, &place)) == 3 && ndm_region_commit(region, 3) == NDM_OK);
    KEEPS_VOID(ndm_view_release(place));
    KEEPS(ndm_region_write_many(region, parts, sizes, 2, 0, slots) == NDM_OK);
    KEEPS(ndm_region_read_many(region, slots, 2, views, sizes) == NDM_OK);
    KEEPS((ndm_view_release(views[0]), ndm_view_try_release(views[1])) == NDM_OK);
    KEEPS(ndm_region_prefetch(region, slots, 2) == NDM_OK);
    KEEPS(ndm_region_load_many(region, slots, 2, buffer, sizeof buffer, lengths) == 150);
    KEEPS(ndm_region_load_many(region, slots, 2, buffer, 1, lengths) == 150);
    KEEPS(ndm_region_free_many(region, slots, 2) == NDM_OK && ndm_region_free_many(region, slots, 0) == NDM_OK);
    lengths[0] = 60, lengths[1] = 40;
    KEEPS(ndm_region_write_packed(region, value, 100, lengths, 2, 0, slots) == NDM_OK);
    KEEPS((view = ndm_region_read(region, 0, &size)) && size == 100);
    KEEPS(ndm_region_try_read(region, 0, &views[0], &size) == NDM_OK);
    KEEPS((ndm_view_release(view), ndm_view_release(views[0]), true));
    KEEPS((place = ndm_region_restore(region, 0, &size)) && (ndm_view_release(place), true));
    KEEPS((view = (const char *)ndm_region_pin(region, 0, NULL)) && (ndm_region_unpin((const uint8_t *)view), true));
    KEEPS(ndm_region_read_into(region, 0, buffer, sizeof buffer) == 100 && ndm_region_read_into(region, 0, buffer, 1) == 100);
    KEEPS(ndm_region_free(region, 2) == NDM_OK);
    KEEPS(ndm_region_slot(region, 2, &shown) == NDM_OK && !shown.occupied);
    KEEPS(ndm_region_contains(region, 2) == 0 && ndm_region_contains(region, 99) == 0 && ndm_region_contains(region, 0) == 1);
}

static void test_space(ndm_region *region)
{
    ndm_stats stats;
    ndm_info info;
    ndm_compaction done;
    ndm_shared shared;
    const int64_t first = 0;
    KEEPS(ndm_region_set_max_capacity(region, 64 << 20) == NDM_OK);
    longest = 64 << 20; /* the new ceiling's address space is refused; what is needed is not */
    for (int i = 0; i < 24; i++)
        KEEPS(ndm_region_write(region, value, sizeof value, 0) >= 0);
    CHECK(longest == UINT64_MAX);
    for (int64_t slot = 10; slot < 20; slot += 2)
        KEEPS(ndm_region_free(region, slot) == NDM_OK);
    KEEPS(ndm_region_compact(region, UINT64_MAX >> 1, &done) == NDM_OK && ndm_region_trim(region) >= 0);
    KEEPS(ndm_region_trim_some(region, 4096) >= 0);
    KEEPS(ndm_region_evict(region, NULL, 0) == NDM_OK && ndm_region_evict(region, &first, 1) == NDM_OK);
    KEEPS(ndm_region_flush(region) == NDM_OK && ndm_region_is_locked(region) == 0 && ndm_region_in_memory(region) == 0);
    KEEPS(ndm_region_stats(region, &stats) == NDM_OK && ndm_region_info(region, &info) == NDM_OK);
    KEEPS(ndm_region_allow_leases(region) == NDM_OK && ndm_region_share(region, 0, &shared) == NDM_OK);
    KEEPS(ndm_region_check(region) == 0);
    KEEPS(ndm_region_adopt(region) == NDM_OK);
    KEEPS(ndm_region_release_ownership(region) == NDM_OK && ndm_region_adopt(region) == NDM_OK);
}

static void test_handles(ndm_region *region)
{
    uint8_t buffer[200];
    const uint8_t *pinned;
    uint64_t handle, size;
    int64_t slot = -1;
    KEEPS((handle = ndm_region_handle(region)) != 0 && ndm_h_region(handle) == region);
    KEEPS((slot = ndm_h_write(handle, (const uint8_t *)value, 10, 0)) >= 0 && ndm_h_size(handle, slot) == 10);
    KEEPS(ndm_h_read_into(handle, slot, buffer, sizeof buffer) == 10 && ndm_h_contains(handle, slot) == 1);
    KEEPS((pinned = ndm_h_pin(handle, slot, &size)) && (ndm_region_unpin(pinned), true));
    KEEPS(ndm_h_free(handle, slot) == NDM_OK && ndm_h_contains(handle, slot) == 0);
}

static void test_readers(void)
{
    char buffer[200];
    const char *view;
    ndm_value found, next;
    ndm_reader_figures figures;
    ndm_leased places[4];
    const char *views[2];
    const int64_t both[] = {0, 2};
    int64_t lease = -1, sizes[2];
    ndm_reader *reader = NULL;
    ndm_region *region = ndm_region_open(path, &options);
    CHECK(region && ndm_region_write(region, value, 100, 0) == 0 && ndm_region_write(region, value, 100, 0) == 1);
    CHECK(ndm_region_write(region, value, 100, 0) == 2 && ndm_region_free(region, 1) == NDM_OK);
    KEEPS((reader = ndm_reader_open(path, slots_path, leases_path)));
    KEEPS(ndm_reader_find(reader, 0, -1, &found) == NDM_OK && ndm_reader_is_unchanged(reader, &found) == 1);
    longest = 4 << 20; /* of the values' mapping */
    KEEPS((view = ndm_reader_read(reader, 0, -1, &found)) && (ndm_view_release(view), true));
    CHECK(longest == UINT64_MAX);
    KEEPS(ndm_reader_copy(reader, 0, -1, buffer, sizeof buffer) == 100 && ndm_reader_copy(reader, 0, -1, buffer, 1) == 100);
    KEEPS(ndm_reader_next(reader, 1, &next) == NDM_OK && next.slot == 2); /* past a freed one */
    KEEPS(ndm_reader_load_many(reader, both, NULL, 2, buffer, sizeof buffer, sizes) == 200);
    KEEPS(ndm_reader_read_many(reader, both, NULL, 2, views, (uint64_t *)sizes) == NDM_OK);
    KEEPS((ndm_view_release(views[0]), ndm_view_release(views[1]), true));
    KEEPS(ndm_reader_leases(reader, places, 4) == 0 && ndm_reader_stats(reader, &figures) == NDM_OK); /* no file */
    CHECK(ndm_region_allow_leases(region) == NDM_OK);
    KEEPS((lease = ndm_reader_lease(reader, 0, -1, &view, &found)) >= 0);
    KEEPS((ndm_view_release(view), ndm_reader_release(reader, lease)) == NDM_OK && ndm_reader_release(reader, 7) == NDM_OK);
    KEEPS(ndm_reader_release(NULL, 0) == NDM_OK);
    CHECK(ndm_region_free(region, 0) == NDM_OK);
    KEEPS(ndm_reader_is_unchanged(reader, &found) == 0);
    ndm_region_destroy(region);
    CHECK((region = ndm_region_open(path, &options)));
    KEEPS_VOID(ndm_reader_close(reader));
    KEEPS_VOID(ndm_reader_destroy(reader));
    CHECK((reader = ndm_reader_open(path, slots_path, leases_path)));
    CHECK(unlink(path) == 0 && ndm_region_write(region, value, 10, 0) == 0);
    KEEPS((lease = ndm_reader_lease(reader, 0, -1, &view, &found)) >= 0); /* the path leads nowhere */
    ndm_view_release(view);
    ndm_region_destroy(region);
    KEEPS(ndm_reader_is_unchanged(reader, &found) >= 0);
    ndm_reader_destroy(reader);
}

static void test_governor(ndm_governor *governor)
{
    static ndm_governor_figures figures;
    uint64_t handle, sizes[256];
    int64_t ticket;
    KEEPS(ndm_governor_add_engine(governor, 0, 1000, 1) == NDM_OK && ndm_governor_set_limit(governor, 0, 2000) == NDM_OK);
    KEEPS(ndm_governor_set_ceiling(governor, 10000, 0) == NDM_OK);
    KEEPS(ndm_governor_reserve(governor, 0, 100) == NDM_OK && ndm_governor_attempt(governor, 0, 100) == NDM_OK);
    KEEPS(ndm_governor_charge(governor, 0, 100) == NDM_OK && ndm_governor_release(governor, 0, 250) == NDM_OK);
    const int tried = ndm_governor_try_reserve(governor, 0, 10);
    KEEPS(tried == NDM_OK ? ndm_governor_try_release(governor, 0, 10) == NDM_OK
                          : tried == NDM_ERR_WAIT && ndm_governor_reserve(governor, 0, 10) == NDM_OK);
    KEEPS((ticket = ndm_governor_queue(governor, 0, 100)) >= 0 && ndm_governor_wait(governor, ticket, 0) == NDM_OK);
    KEEPS(ndm_governor_changes(governor, ndm_governor_changes(governor, -1, 0), 1000) >= 0);
    KEEPS((ticket = ndm_governor_queue(governor, 0, 100)) >= 0 && (ndm_governor_leave(governor, ticket), true));
    KEEPS(ndm_governor_note_rejected(governor, 0) == NDM_OK && ndm_governor_note_reclaimed(governor, 0, 10) == NDM_OK);
    KEEPS(ndm_governor_pressure(governor, -1) == NDM_NORMAL && ndm_governor_allocated(governor, 0) > 0);
    KEEPS(ndm_governor_note_real(governor, 1 << 20, 50) == NDM_OK && ndm_governor_ask(governor, 0, 10) >= 0);
    KEEPS(ndm_governor_is_asked(governor) >= 0 && ndm_governor_asked(governor, sizes) >= 0);
    KEEPS(ndm_governor_snapshot(governor, &figures) == NDM_OK && ndm_governor_epoch(governor) == 0);
    KEEPS(ndm_governor_check(governor) == 0);
    KEEPS((handle = ndm_governor_handle(governor)) != 0);
    KEEPS(ndm_g_reserve(handle, 0, 10) == NDM_OK && ndm_g_charge(handle, 0, 10) == NDM_OK);
    KEEPS(ndm_g_release(handle, 0, 20) == NDM_OK && ndm_g_pressure(handle, 0) == NDM_NORMAL && ndm_g_allocated(handle, 0) > 0);
    KEEPS_VOID(ndm_governor_destroy(governor));
}

static void test_governors(void)
{
    const ndm_governor_options some = {.ceiling = 5000, .warning = 70, .critical = 85, .emergency = 95, .hysteresis = 5};
    ndm_governor *governor = NULL;
    KEEPS((governor = ndm_governor_create(&some)));
    test_governor(governor);
    KEEPS((governor = ndm_governor_open(path, &some))); /* no file is there */
    test_governor(governor);
    KEEPS((governor = ndm_governor_open(path, NULL)) && (ndm_governor_destroy(governor), true));
    KEEPS_VOID(ndm_governor_destroy(NULL));
    CHECK(unlink(path) == 0);
}

int main(void)
{
    CHECK(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/r", folder);
    snprintf(slots_path, sizeof slots_path, "%s.slots", path);
    snprintf(leases_path, sizeof leases_path, "%s.leases", path);
    test_opening();
    ndm_region *region = NULL;
    KEEPS((region = ndm_region_open_temporary(folder, &options)));
    test_values(region);
    test_space(region);
    test_handles(region);
    ndm_region_destroy(region);
    test_readers();
    test_governors();
    unlink(path), unlink(slots_path), unlink(leases_path), rmdir(folder);
    CHECK(failed == 0);
    printf("no call that goes well changes the last error\n");
    return 0;
}
