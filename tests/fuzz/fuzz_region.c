/* A region on a real file against a model: every input is a sequence of verbs, mishaps of the system among them. After
 * each one the region is checked, every live value and every live view is compared with what was written, and a verb
 * that failed must have changed nothing. Built and run by `make fuzz`; disk.c plays the disk. */
#define NDM_FUZZ_DISK
#include "faults.h"

#include "disk.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>

#define CHECK(condition)                                                                               \
    do {                                                                                               \
        if (!(condition)) {                                                                            \
            fprintf(stderr, "%s:%d: %s (last error: %d, errno %d)\n", __FILE__, __LINE__, #condition, \
                    ndm_last_error()->status, ndm_last_error()->os_errno);                             \
            abort();                                                                                   \
        }                                                                                              \
    } while (0)

enum { MOST_VALUES = 48, MOST_VIEWS = 32, LARGEST = 1 << 20 };

struct value {
    int64_t slot;
    uint64_t size;
    uint32_t at; /* its bytes are bytes[at], bytes[at + 1], ... */
    uint8_t engine;
};

struct view {
    const char *start;
    uint64_t size;
    uint32_t at;
};

static uint8_t bytes[LARGEST + 65536];
static const uint8_t zeros[LARGEST];
static const char *directory = "/tmp";
static char path[200], slots_path[220];

static ndm_region *region;
static struct value values[MOST_VALUES];
static struct view views[MOST_VIEWS];
static size_t value_count, view_count;
static uint32_t written;
static ndm_options options;
static bool named;

/* ---- the input ---- */

static const uint8_t *input;
static size_t input_size;

static uint32_t byte(void)
{
    if (input_size == 0)
        return 0;
    input_size--;
    return *input++;
}

static uint32_t word(void)
{
    const uint32_t low = byte();
    return low | byte() << 8;
}

static uint64_t any_size(void)
{
    switch (byte() % 4) {
    case 0:
        return byte();
    case 1:
        return word();
    case 2:
        return (uint64_t)word() * 16 % LARGEST;
    default: /* around the sizes that matter */
        return ((uint64_t[]){4096, 65536, 262144, 524288})[byte() % 4] + byte() % 5 - 2;
    }
}

/* ---- what has to be true ---- */

static void check_values(void)
{
    uint64_t live_bytes = 0;
    ndm_stats stats;
    for (size_t i = 0; i < value_count; i++) {
        const struct value *value = &values[i];
        ndm_slot slot;
        CHECK(ndm_region_slot(region, value->slot, &slot) == NDM_OK);
        CHECK(slot.occupied && slot.size == value->size && slot.engine == value->engine);
        CHECK(slot.offset % options.alignment == 0 && slot.offset + slot.size <= region->used_bytes);
        CHECK(memcmp(region->data.mapping->base + slot.offset, bytes + value->at, value->size) == 0);
        live_bytes += value->size;
    }
    CHECK(ndm_region_stats(region, &stats) == NDM_OK);
    CHECK(stats.live_bytes == live_bytes && stats.live_slots == value_count);
    CHECK(stats.used_bytes <= stats.capacity && stats.capacity <= stats.max_capacity);
    CHECK(stats.live_bytes + stats.free_bytes <= stats.used_bytes + 4096);
    CHECK(stats.largest_free_bytes <= stats.free_bytes);
}

static void check_all(void)
{
    for (size_t i = 0; i < view_count; i++)
        CHECK(memcmp(views[i].start, bytes + views[i].at, views[i].size) == 0);
    if (!region)
        return;
    const int fail = disk.fail;
    disk.fail = 0; /* what was armed is for the verbs */
    CHECK(ndm_region_check(region) == 0);
    CHECK(disk_is_sound(region));
    check_values();
    disk.fail = fail;
}

/* What a verb that fails may not change. */
static ndm_stats snapshot(void)
{
    ndm_stats stats;
    const int fail = disk.fail;
    disk.fail = 0;
    CHECK(ndm_region_stats(region, &stats) == NDM_OK);
    disk.fail = fail;
    stats.disk_bytes = stats.can_punch = 0;
    stats.resident_bytes = stats.unwritten_bytes = stats.written_back_bytes = 0;
    return stats;
}

static void check_unchanged(const ndm_stats *before)
{
    ndm_stats after = snapshot();
    const ndm_error *error = ndm_last_error();
    if (after.moved_bytes > before->moved_bytes) { /* the disk refused it after room had been made */
        CHECK(error->status != NDM_ERR_CAPACITY);
        after.moved_bytes = before->moved_bytes;
        after.largest_free_bytes = before->largest_free_bytes;
        /* A hole that comes to the end loses what is behind used_bytes, which ends with a value, within a unit. */
        CHECK(after.free_bytes <= before->free_bytes && before->free_bytes - after.free_bytes < options.alignment);
        after.free_bytes = before->free_bytes;
    }
    CHECK(memcmp(before, &after, sizeof after) == 0);
    CHECK(error->status != NDM_ERR_IO || (error->os_errno != 0 && error->os_errno != EINTR));
    CHECK(error->status != NDM_ERR_CAPACITY || error->required > error->limit);
    CHECK(error->status == NDM_ERR_IO || error->status == NDM_ERR_CAPACITY || error->status == NDM_ERR_MEMORY);
}

/* What the ceiling refuses does not fit, however the values that have no view are moved. */
static void check_refusal(uint64_t size)
{
    uint64_t padded = 0;
    for (size_t i = 0; i < value_count; i++)
        padded += (values[i].size + options.alignment - 1) / options.alignment * options.alignment;
    CHECK(ndm_last_error()->status != NDM_ERR_CAPACITY || view_count > 0 || padded + size > options.max_capacity ||
          !region->data.keeps_blocks || disk.fail > 0);
}

/* ---- verbs ---- */

static void write_value(void)
{
    const uint64_t size = any_size();
    const uint8_t source = (uint8_t)byte();
    const void *data = bytes + (written += 4051) % 65536;
    struct value value = {.size = size, .at = written % 65536, .engine = source};
    if (value_count == MOST_VALUES)
        return;
    if (source % 4 == 0 && view_count > 0) { /* from the region itself */
        const struct view *view = &views[source / 4 % view_count];
        data = view->start;
        value.size = view->size;
        value.at = view->at;
    }
    const ndm_stats before = snapshot();
    value.slot = ndm_region_write(region, data, value.size, value.engine);
    if (value.slot < 0) {
        check_unchanged(&before);
        check_refusal(value.size);
    } else {
        values[value_count++] = value;
    }
}

static void write_many(void)
{
    enum { COUNT = 3 };
    const void *parts[COUNT];
    uint64_t sizes[COUNT];
    int64_t slots[COUNT];
    struct value fresh[COUNT];
    if (value_count + COUNT > MOST_VALUES)
        return;
    for (int i = 0; i < COUNT; i++) {
        fresh[i] = (struct value){.size = sizes[i] = any_size(), .at = (written += 4051) % 65536, .engine = 7};
        parts[i] = bytes + fresh[i].at;
    }
    const ndm_stats before = snapshot();
    if (ndm_region_write_many(region, parts, sizes, COUNT, 7, slots) != NDM_OK) {
        check_unchanged(&before);
        return;
    }
    for (int i = 0; i < COUNT; i++) {
        fresh[i].slot = slots[i];
        values[value_count++] = fresh[i];
    }
}

/* One value out of two neighbouring parts. */
static void write_vectored(void)
{
    struct value value = {.at = (written += 4051) % 65536, .size = any_size(), .engine = 8};
    const uint64_t cut = value.size * byte() / 255;
    const void *parts[] = {bytes + value.at, bytes + value.at + cut};
    const uint64_t sizes[] = {cut, value.size - cut};
    if (value_count == MOST_VALUES)
        return;
    const ndm_stats before = snapshot();
    value.slot = ndm_region_write_vectored(region, parts, sizes, 2, 0, 8);
    if (value.slot < 0)
        check_unchanged(&before);
    else
        values[value_count++] = value;
}

static void allocate(void)
{
    struct value value = {.at = (written += 4051) % 65536, .size = any_size(), .engine = 9};
    char *view;
    if (value_count == MOST_VALUES || view_count == MOST_VIEWS)
        return;
    const ndm_stats before = snapshot();
    value.slot = ndm_region_allocate(region, value.size, 9, &view);
    if (value.slot < 0) {
        const ndm_error *error = ndm_last_error();
        if (error->status != NDM_ERR_IO || error->os_errno != EOPNOTSUPP)
            check_unchanged(&before);
        return;
    }
    CHECK(memcmp(view, zeros, value.size) == 0);
    memcpy(view, bytes + value.at, value.size);
    values[value_count++] = value;
    views[view_count++] = (struct view){view, value.size, value.at};
}

static void restore(void)
{
    if (value_count == 0 || view_count == MOST_VIEWS)
        return;
    const struct value *value = &values[byte() % value_count];
    uint64_t size;
    const ndm_stats before = snapshot();
    char *start = ndm_region_restore(region, value->slot, &size);
    if (!start) {
        check_unchanged(&before);
        return;
    }
    CHECK(size == value->size && memcmp(start, bytes + value->at, size) == 0);
    const uint32_t at = byte();
    memcpy(start, bytes + at, size); /* seen by nobody else */
    views[view_count++] = (struct view){start, size, at};
}

static void read_batch(void)
{
    enum { MOST = 8 };
    int64_t slots[MOST], lengths[MOST];
    const char *starts[MOST];
    uint64_t sizes[MOST], count = value_count ? byte() % MOST : 0, at = 0;
    static char copies[MOST * LARGEST];
    const struct value *wanted[MOST];
    for (uint64_t i = 0; i < count; i++)
        slots[i] = (wanted[i] = &values[byte() % value_count])->slot;
    if (byte() % 2)
        CHECK(ndm_region_prefetch(region, slots, count) == NDM_OK);
    if (ndm_region_read_many(region, slots, count, starts, sizes) == NDM_OK)
        for (uint64_t i = 0; i < count; i++) {
            CHECK(sizes[i] == wanted[i]->size && memcmp(starts[i], bytes + wanted[i]->at, sizes[i]) == 0);
            ndm_view_release(starts[i]);
        }
    if (ndm_region_load_many(region, slots, count, copies, sizeof copies, lengths) >= 0)
        for (uint64_t i = 0; i < count; at += wanted[i++]->size)
            CHECK(lengths[i] == (int64_t)wanted[i]->size && memcmp(copies + at, bytes + wanted[i]->at, wanted[i]->size) == 0);
}

static void evict(void)
{
    const int64_t slot = value_count ? values[byte() % value_count].slot : 0;
    CHECK(ndm_region_evict(region, value_count && byte() % 2 ? &slot : NULL, 1) == NDM_OK);
    CHECK(ndm_region_flush(region) == NDM_OK);
}

static void free_value(void)
{
    if (value_count == 0)
        return;
    const size_t which = byte() % value_count;
    const int64_t slot = values[which].slot;
    CHECK(ndm_region_free(region, slot) == NDM_OK);
    CHECK(ndm_region_free(region, slot) == NDM_ERR_FREED_SLOT);
    values[which] = values[--value_count];
}

static void read_value(void)
{
    if (value_count == 0 || view_count == MOST_VIEWS)
        return;
    const struct value *value = &values[byte() % value_count];
    uint64_t size = UINT64_MAX;
    const ndm_stats before = snapshot();
    const char *start = ndm_region_read(region, value->slot, &size);
    if (!start) {
        check_unchanged(&before);
        CHECK(size == UINT64_MAX);
        return;
    }
    CHECK(size == value->size);
    views[view_count++] = (struct view){start, size, value->at};
}

static void *release_elsewhere(void *view)
{
    ndm_view_release(view);
    return NULL;
}

static void release_view(void)
{
    if (view_count == 0)
        return;
    const uint32_t choice = byte();
    const size_t which = choice % view_count;
    pthread_t thread;
    if (choice < 8 && pthread_create(&thread, NULL, release_elsewhere, (void *)views[which].start) == 0)
        pthread_join(thread, NULL);
    else
        ndm_view_release(views[which].start);
    views[which] = views[--view_count];
}

static void raise_ceiling(void)
{
    const uint64_t ceiling = options.max_capacity + word() * 64;
    if (ceiling > (uint64_t)DISK_BLOCKS * DISK_BLOCK / 2)
        return;
    CHECK(ndm_region_set_max_capacity(region, ceiling) == NDM_OK);
    CHECK(ceiling == options.max_capacity || ndm_region_set_max_capacity(region, ceiling - 1) == NDM_ERR_ARGUMENT);
    options.max_capacity = ceiling;
}

static void trim(void)
{
    const ndm_stats before = snapshot();
    const bool in_pieces = before.live_slots % 2 == 1;
    const int64_t given = in_pieces ? ndm_region_trim_some(region, before.live_slots << 12) : ndm_region_trim(region);
    const ndm_stats after = snapshot();
    CHECK(given >= 0 || ndm_last_error()->os_errno == EIO);
    CHECK(after.used_bytes <= before.used_bytes && after.capacity <= before.capacity);
    CHECK(after.capacity >= options.initial_capacity || after.capacity == before.capacity);
}

static void compact(void)
{
    const uint32_t choice = byte();
    const uint64_t budget = choice % 4 == 0 ? UINT64_MAX : (uint64_t)word() << choice % 6;
    ndm_compaction done = {.moved_bytes = 77};
    const ndm_stats before = snapshot();
    const int status = ndm_region_compact(region, budget, &done);
    const ndm_stats after = snapshot();
    CHECK(after.used_bytes <= before.used_bytes);
    if (status != NDM_OK) {
        CHECK(done.moved_bytes == 77);
        return;
    }
    CHECK(done.moved_bytes <= budget && done.moved_bytes == after.moved_bytes - before.moved_bytes);
    if (budget == UINT64_MAX)
        CHECK(done.remaining_bytes == 0);
    if (budget == UINT64_MAX && view_count == 0) {
        CHECK(after.used_bytes <= after.live_bytes * 102 / 100 + value_count * options.alignment);
    }
}

static void copy_value(void)
{
    static uint8_t copy[LARGEST + 4];
    if (value_count == 0)
        return;
    const struct value *value = &values[byte() % value_count];
    const uint64_t room = byte() % 2 ? value->size : value->size / 2;
    copy[0] = (uint8_t)~bytes[value->at];
    CHECK(ndm_region_read_into(region, value->slot, copy, room) == (int64_t)value->size);
    CHECK(room < value->size ? copy[0] != bytes[value->at] : memcmp(copy, bytes + value->at, room) == 0);
}

static void misuse(void)
{
    uint64_t size;
    ndm_info info = {0};
    ndm_region_info(region, &info);
    const int64_t slot = byte() % 2 ? -(int64_t)byte() - 1 : (int64_t)info.slot_count + byte();
    CHECK(!ndm_region_read(region, slot, &size) && ndm_last_error()->status == NDM_ERR_NO_SLOT);
    CHECK(ndm_region_free(region, slot) == NDM_ERR_NO_SLOT);
    CHECK(ndm_region_contains(region, slot) == 0);
    CHECK(ndm_region_write(region, bytes, 1, 256) == NDM_ERR_ARGUMENT);
    CHECK(ndm_region_write(region, bytes, UINT64_MAX, 0) == NDM_ERR_CAPACITY);
}

static void arm(void)
{
    static const int errors[] = {EIO, ENOSPC, EDQUOT, EINTR, EFBIG, ENOMEM};
    const uint32_t choice = byte();
    disk.fail = (int)byte();
    disk.fail_after = choice & 15;
    disk.fail_errno = errors[(choice >> 4) % 6];
}

static void open_region(void)
{
    const int fail = disk.fail;
    region = named ? ndm_region_open(path, &options) : ndm_region_open_temporary(directory, &options);
    disk.region = region;
    if (region) {
        ndm_info info;
        CHECK(ndm_region_info(region, &info) == NDM_OK && info.used_bytes == 0);
        options.initial_capacity = info.capacity;
        return;
    }
    const int status = ndm_last_error()->status;
    CHECK(fail || disk.free_blocks == 0 || disk.address_limit < SIZE_MAX || status == NDM_ERR_BUSY ||
          status == NDM_ERR_CAPACITY || (status == NDM_ERR_IO && ndm_last_error()->os_errno == ENOSPC));
    CHECK(status != NDM_ERR_BUSY || (named && view_count > 0));
}

static void close_region(void)
{
    ndm_region *closed = region;
    CHECK(ndm_region_close(closed) == NDM_OK && ndm_region_close(closed) == NDM_OK);
    CHECK(ndm_region_trim(closed) == NDM_ERR_CLOSED);
    region = disk.region = NULL;
    value_count = 0;
    ndm_region_destroy(closed);
}

static void step(void)
{
    static void (*const verbs[])(void) = {
        write_value, write_value, write_value,   write_many, write_vectored, allocate,   free_value,
        free_value,  free_value,  read_value,    read_batch, restore,        release_view, release_view,
        evict,       trim,        raise_ceiling, compact,    compact,        copy_value, misuse};
    const uint32_t choice = byte();
    if (choice >= 240)
        arm();
    else if (choice >= 232)
        disk.free_blocks = choice % 2 ? UINT64_MAX / 2 : word() % 256;
    else if (choice >= 228 && region)
        close_region();
    else if (!region)
        open_region();
    else
        verbs[choice % (sizeof verbs / sizeof *verbs)]();
}

static void start(void)
{
    const uint32_t flags = byte();
    disk_reset();
    disk.in_memory = flags & 1;
    disk.no_allocate = (flags & 15) == 2; /* a tmpfs can */
    disk.no_punch = (flags & 14) == 4;
    disk.moves_blocks = (flags & 15) == 6; /* no store through the mapping is safe */
    named = flags & 16;
    options.alignment = (uint64_t)1 << byte() % 13;
    options.initial_capacity = 1 + word() * 16;
    options.max_capacity = options.initial_capacity + word() * 64;
    if (flags & 32)
        disk.address_limit = (uint64_t)(2 + byte() % 8) << 20;
    options.cache_limit = flags & 64 ? 0 : UINT64_MAX;
    written = 0;
    value_count = view_count = 0;
    open_region();
}

static void finish(void)
{
    if (region && byte() % 2)
        close_region();
    else if (region) {
        ndm_region_destroy(region);
        region = disk.region = NULL;
    }
    while (view_count > 0) {
        check_all();
        ndm_view_release(views[--view_count].start);
    }
    unlink(path);
    unlink(slots_path);
}

/* At the end: a kind of call that no longer goes through disk.c would show here as one that never failed. */
static void report_faults(void)
{
    static const char *const kinds[] = {"pwrite", "fallocate", "punch", "ftruncate", "fstat", "mmap", "malloc"};
    fprintf(stderr, "calls that were made to fail:");
    for (int kind = 0; kind < 7; kind++)
        fprintf(stderr, " %s %lu", kinds[kind], disk.fired[kind]);
    fprintf(stderr, "\n");
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    if (getenv("TMPDIR"))
        directory = getenv("TMPDIR");
    atexit(report_faults);
    uint64_t state = 88172645463325252u;
    for (size_t i = 0; i < sizeof bytes; i++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        bytes[i] = (uint8_t)(state >> 32);
    }
    snprintf(path, sizeof path, "%s/nodedb-mem-fuzz-%d", directory, getpid());
    snprintf(slots_path, sizeof slots_path, "%s.slots", path);
    /* What is made once a process is no leak. */
    const ndm_options small = {.initial_capacity = 1, .max_capacity = 1, .alignment = 1, .cache_limit = UINT64_MAX};
    disk_reset();
    ndm_region_destroy(ndm_region_open_temporary(directory, &small));
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const int lowest = dup(0);
    const int64_t mapped = disk.mapped;
    close(lowest);
    input = data;
    input_size = size;
    start();
    while (input_size > 0) {
        step();
        check_all();
    }
    disk_reset();
    finish();
    const int now = dup(0);
    close(now);
    CHECK(now == lowest && disk.mapped == mapped);
    return 0;
}
