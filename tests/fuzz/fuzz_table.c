/* Any slot table and any leases file: an input is a list of words that are set in the files of a sound region, or of
 * lengths that these are cut to. Leases may be held meanwhile. Then a reader looks at all that it is shown, an owner
 * recovers the region, and one opens it by default. Each may refuse. An open that was refused has changed neither the
 * values nor the table. Built and run by `make fuzz`; nothing fails on the disk here. */
#define NDM_FUZZ_DISK
#include "faults.h"

#include "disk.h"
#include "os/identity.h"

#include <stdio.h>
#include <time.h>

#define CHECK(condition)                                                                              \
    do {                                                                                              \
        if (!(condition)) {                                                                           \
            fprintf(stderr, "%s:%d: %s (last error: %d, errno %d: %s)\n", __FILE__, __LINE__,        \
                    #condition, ndm_last_error()->status, ndm_last_error()->os_errno,                \
                    ndm_last_error()->message);                                                      \
            abort();                                                                                  \
        }                                                                                             \
    } while (0)

enum { DATA, TABLE, LEASES, FILES, VALUES = 8, VALUE = 3000, MOST = 1 << 18 };

struct image {
    char path[240];
    int fd;
    uint64_t size;
    uint8_t bytes[MOST];
};

static struct image files[FILES];
static ndm_i_identity identity;
static const ndm_options fresh = {
    .initial_capacity = 65536, .max_capacity = 1 << 20, .alignment = 64, .cache_limit = UINT64_MAX};
static const ndm_options recovered = {
    .initial_capacity = 65536, .max_capacity = 1 << 20, .alignment = 64, .cache_limit = UINT64_MAX, .recover = 1};

/* Nobody moves a value meanwhile: a reader need not wait. */
int nanosleep(const struct timespec *duration, struct timespec *left)
{
    (void)duration, (void)left;
    return 0;
}

/* ---- files ---- */

static uint64_t size_of(const struct image *image)
{
    struct stat facts;
    CHECK(fstat(image->fd, &facts) == 0);
    return (uint64_t)facts.st_size;
}

static void take(struct image *image)
{
    image->fd = open(image->path, O_RDWR | O_CLOEXEC);
    CHECK(image->fd >= 0);
    image->size = size_of(image);
    CHECK(image->size <= MOST && pread(image->fd, image->bytes, image->size, 0) == (ssize_t)image->size);
}

/* The file as it was in the sound region. A file of another number would be another region's. */
static void put_back(const struct image *image)
{
    CHECK(ftruncate(image->fd, (off_t)image->size) == 0);
    CHECK(pwrite(image->fd, image->bytes, image->size, 0) == (ssize_t)image->size);
}

static uint64_t digest(const struct image *image)
{
    static uint8_t now[2 * MOST];
    const uint64_t size = size_of(image);
    uint64_t sum = size * 0x9e3779b97f4a7c15;
    CHECK(size <= sizeof now && pread(image->fd, now, size, 0) == (ssize_t)size);
    for (uint64_t i = 0; i < size; i++)
        sum = (sum ^ now[i]) * 0x100000001b3;
    return sum;
}

/* ---- the input ---- */

static const uint8_t *input;
static size_t input_size;

static uint64_t number(size_t bytes)
{
    uint64_t value = 0;
    for (size_t i = 0; i < bytes && input_size > 0; i++, input_size--)
        value |= (uint64_t)*input++ << 8 * i;
    return value;
}

static void set(const struct image *image, uint64_t offset, uint64_t word)
{
    if (offset + sizeof word <= size_of(image))
        CHECK(pwrite(image->fd, &word, sizeof word, (off_t)offset) == sizeof word);
}

static void spoil(void)
{
    const uint64_t kind = number(1) % 16, place = number(1);
    if (kind < 5)
        set(&files[TABLE], 8 * (place % (sizeof(ndm_i_header) / 8)), number(8));
    else if (kind < 7) /* small words matter most */
        set(&files[TABLE], 8 * (place % (sizeof(ndm_i_header) / 8)), number(2));
    else if (kind < 11)
        set(&files[TABLE], NDM_I_HEADER_ROOM + 8 * (place % (3 * (VALUES + 2))), number(8));
    else if (kind < 12) /* a state */
        set(&files[TABLE], NDM_I_HEADER_ROOM + sizeof(ndm_i_record) * (place % VALUES) + 8, VALUE | number(1) << 56);
    else if (kind < 15)
        set(&files[LEASES], 8 * (place % 64), number(place % 2 ? 8 : 2));
    else
        CHECK(ftruncate(files[place % FILES].fd, (off_t)(number(2) % (place % FILES == DATA ? 65536 : 8192))) == 0);
}

/* ---- what is done with the files ---- */

static void look(void)
{
    ndm_value value;
    ndm_reader_figures figures;
    static ndm_leased leased[NDM_MOST_LEASES];
    static char copy[4096];
    ndm_reader *reader = ndm_reader_open(files[DATA].path, files[TABLE].path, files[LEASES].path);
    if (!reader) {
        CHECK(ndm_last_error()->status < 0 && ndm_last_error()->message);
        return;
    }
    if (ndm_reader_stats(reader, &figures) == NDM_OK)
        CHECK(figures.alignment > 0 && figures.capacity == size_of(&files[DATA]));
    ndm_reader_leases(reader, leased, NDM_MOST_LEASES);
    for (int64_t slot = -1; slot <= VALUES; slot++) {
        ndm_reader_find(reader, slot, slot % 3 - 1, &value);
        ndm_reader_copy(reader, slot, -1, copy, sizeof copy);
        const char *view = ndm_reader_read(reader, slot, -1, &value);
        if (view && value.size > 0) {
            CHECK(value.offset + value.size <= figures.capacity);
            copy[0] = view[0], copy[1] = view[value.size - 1];
        }
        ndm_view_release(view);
    }
    int64_t from = 0;
    for (int step = 0; step < 3 * VALUES && ndm_reader_next(reader, from, &value) == NDM_OK; step++) {
        CHECK(value.slot >= from);
        from = value.slot + 1;
    }
    ndm_reader_destroy(reader);
}

/* An owner that opened the files works with them. */
static void work(ndm_region *region)
{
    static char copy[1 << 20];
    ndm_info info;
    ndm_compaction done;
    CHECK(ndm_region_check(region) == 0 && ndm_region_info(region, &info) == NDM_OK);
    for (int64_t slot = 0; slot < (int64_t)info.slot_count && slot < 64; slot++)
        if (ndm_region_contains(region, slot))
            CHECK(ndm_region_read_into(region, slot, copy, sizeof copy) >= 0);
    ndm_region_allow_leases(region);
    const int64_t mine = ndm_region_write(region, "value", 5, 0);
    if (mine >= 0)
        CHECK(ndm_region_read_into(region, mine, copy, 5) == 5 && memcmp(copy, "value", 5) == 0);
    ndm_region_compact(region, UINT64_MAX, &done);
    CHECK(ndm_region_check(region) == 0);
    if (mine >= 0)
        CHECK(ndm_region_read_into(region, mine, copy, 5) == 5 && memcmp(copy, "value", 5) == 0);
    ndm_region_trim(region);
    CHECK(ndm_region_check(region) == 0);
}

static void open_as(const ndm_options *options)
{
    const uint64_t data = digest(&files[DATA]), table = digest(&files[TABLE]);
    ndm_region *region = ndm_region_open(files[DATA].path, options);
    if (region) {
        work(region);
        ndm_region_destroy(region);
        return;
    }
    const int status = ndm_last_error()->status;
    CHECK(status == NDM_ERR_IO || status == NDM_ERR_MEMORY || status == NDM_ERR_CAPACITY);
    CHECK(digest(&files[DATA]) == data && digest(&files[TABLE]) == table);
}

static void open_sound(void)
{
    ndm_shared shared;
    char value[VALUE];
    for (int i = 0; i < FILES; i++)
        unlink(files[i].path);
    ndm_region *region = ndm_region_open(files[DATA].path, &fresh);
    CHECK(region);
    for (int i = 0; i < VALUES; i++) {
        memset(value, 'a' + i, sizeof value);
        CHECK(ndm_region_write(region, value, sizeof value, i) == i);
    }
    CHECK(ndm_region_free(region, 2) == NDM_OK && ndm_region_allow_leases(region) == NDM_OK);
    CHECK(ndm_region_share(region, 0, &shared) == NDM_OK);
    ndm_region_destroy(region);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    static const char *const endings[] = {"", ".slots", ".leases"};
    (void)argc, (void)argv;
    disk_reset();
    for (int i = 0; i < FILES; i++)
        snprintf(files[i].path, sizeof files[i].path, "%.150s/nodedb-mem-fuzz-table-%d%s",
                 getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp", getpid(), endings[i]);
    open_sound();
    for (int i = 0; i < FILES; i++)
        take(&files[i]);
    identity = ndm_i_identity_of(&(ndm_i_file){.fd = files[DATA].fd});
    return 0;
}

static void remove_files(void)
{
    for (int i = 0; i < FILES; i++)
        unlink(files[i].path);
}

/* A reader that opened the sound region and leases two of its values meanwhile; its views are not touched. */
static ndm_reader *keep_values(void)
{
    ndm_value value;
    const char *view;
    ndm_reader *keeper = ndm_reader_open(files[DATA].path, files[TABLE].path, files[LEASES].path);
    CHECK(keeper);
    for (int64_t slot = 1; slot < 4; slot += 2) {
        CHECK(ndm_reader_lease(keeper, slot, -1, &view, &value) >= 0);
        ndm_view_release(view);
    }
    return keeper;
}

static void restore_files(void)
{
    for (int i = 0; i < FILES; i++)
        if (access(files[i].path, F_OK) != 0) { /* a leases file of another version made room for a new one */
            close(files[i].fd);
            files[i].fd = open(files[i].path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
            CHECK(files[i].fd >= 0);
        } else if (i == LEASES) {
            close(files[i].fd);
            CHECK((files[i].fd = open(files[i].path, O_RDWR | O_CLOEXEC)) >= 0);
        }
    for (int i = 0; i < FILES; i++)
        put_back(&files[i]);
    if (ndm_i_identity_is_set(identity))
        CHECK(ndm_i_identity_set(&(ndm_i_file){.fd = files[DATA].fd}, identity));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static bool registered;
    if (!registered)
        registered = atexit(remove_files) == 0;
    restore_files();
    input = data;
    input_size = size;
    ndm_reader *keeper = number(1) % 2 ? keep_values() : NULL;
    while (input_size > 0)
        spoil();
    look();
    open_as(&recovered);
    open_as(&fresh);
    ndm_reader_destroy(keeper);
    return 0;
}
