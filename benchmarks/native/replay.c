/* Replays one fragmentation workload on one allocator and prints what it took, as a line of JSON.
 *
 *   replay region|compact|naive|malloc FROM TO DELETE FROM2 TO2 LIVE FILL TOTAL ALIGNMENT SEED [DIRECTORY]
 *
 * Without DIRECTORY the region is in memory, which changes nothing but the time.
 *
 * The trace: values of FROM to TO bytes until FILL bytes are written, at most LIVE of them live (room is made by
 * deleting values at random); then DELETE per cent of the values go, at random; then values of FROM2 to TO2 bytes, the
 * same way, until TOTAL bytes are written in all. It depends on these numbers and on SEED, not on the allocator.
 *
 *   region   the C core, as it is
 *   compact  the C core; after each 64 KiB written, ndm_region_compact() with the bytes written since as its budget
 *   naive    whole slots: the shortest free slot that is long enough, neither split nor joined; else fresh space
 *   malloc   whatever malloc is linked or preloaded, by aligned_alloc() above 16 bytes; every byte is written
 *
 * `peak` is the most that was ever used: used_bytes of the region and of the naive slots; for malloc the growth of the
 * process's resident pages over what it had before the trace, looked at every 64 KiB. `span` is the most that malloc
 * says it holds, resident or not: arena + hblkhd of mallinfo2(), looked at every 4 MiB, or stats.mapped of jemalloc.
 * `floor` is the most bytes that live values ever needed with each rounded up to ALIGNMENT: no allocator can stay below
 * it. `metadata` is what the C core keeps in RAM beside the file: a record for each slot, a node for each extent.
 * Values are compared with what was written when they are deleted. */
#define _GNU_SOURCE
#include "region/ledger.h" /* for the number of extents, which is not public */
#include "timing.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <malloc.h>
#include <sys/prctl.h>
#include <unistd.h>

enum { STEP = 64 << 10, LONGEST = 1 << 20, EXTENT = 40 };

/* Memory that no malloc sees, all of it resident. */
static void *pages(uint64_t size)
{
    void *start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (start == MAP_FAILED)
        fail("no memory");
    return start;
}

typedef struct {
    uint64_t handle;
    uint32_t size;
    uint32_t stamp; /* its bytes are those of the pattern from here */
} value_t;

static uint8_t *pattern; /* twice LONGEST random bytes */
static value_t *values;
static uint64_t value_count, value_room, written, live, padded, alignment;
static uint64_t peak, span, most_padded, metadata, moved, calls;

static uint64_t round_up(uint64_t size) { return (size + alignment - 1) / alignment * alignment; }

static void raise_to(uint64_t *most, uint64_t now) { *most = now > *most ? now : *most; }

/* ---- the allocators ---- */

typedef struct {
    void (*start)(const char *directory);
    uint64_t (*write)(const uint8_t *data, uint64_t size);
    void (*drop)(uint64_t handle, const uint8_t *data, uint64_t size);
    void (*step)(uint64_t bytes); /* after every STEP bytes or more */
} allocator_t;

static ndm_region *region;

static void region_start(const char *directory)
{
    ndm_options options = {.initial_capacity = 1 << 20, .max_capacity = (uint64_t)1 << 36, .alignment = alignment};
    if (!(region = ndm_region_open_temporary(directory, &options)))
        fail(ndm_last_error()->message);
}

static uint64_t region_write(const uint8_t *data, uint64_t size)
{
    ndm_info info;
    int64_t slot = ndm_region_write(region, data, size, 0);
    if (slot < 0 || ndm_region_info(region, &info) < 0)
        fail(ndm_last_error()->message);
    raise_to(&peak, info.used_bytes);
    return (uint64_t)slot;
}

static void region_drop(uint64_t handle, const uint8_t *data, uint64_t size)
{
    uint64_t found;
    const char *view = ndm_region_read(region, (int64_t)handle, &found);
    if (!view || found != size || memcmp(view, data, size) != 0)
        fail("a value has changed");
    ndm_view_release(view);
    if (ndm_region_free(region, (int64_t)handle) != NDM_OK)
        fail(ndm_last_error()->message);
}

static void region_step(uint64_t bytes)
{
    (void)bytes;
    raise_to(&metadata, region->slots.count * sizeof(ndm_i_record) + (uint64_t)region->extents.node_count * EXTENT);
}

static void compact_step(uint64_t bytes)
{
    ndm_compaction done;
    if (ndm_region_compact(region, bytes, &done) != NDM_OK)
        fail(ndm_last_error()->message);
    if (done.moved_bytes > bytes)
        fail("moved more than the budget");
    moved += done.moved_bytes;
    region_step(bytes);
}

static uint64_t slots_end, longest_slot;
static uint64_t free_slots[2 * LONGEST]; /* how many there are of each length */

static void naive_start(const char *directory) { (void)directory; }

/* A handle is the slot's length: where it lies does not matter. */
static uint64_t naive_write(const uint8_t *data, uint64_t size)
{
    (void)data;
    uint64_t length = round_up(size);
    while (length <= longest_slot && free_slots[length] == 0)
        length += alignment;
    if (length <= longest_slot) {
        free_slots[length]--;
    } else {
        length = round_up(size);
        raise_to(&longest_slot, length);
        slots_end += length;
        raise_to(&peak, slots_end);
    }
    return length;
}

static void naive_drop(uint64_t handle, const uint8_t *data, uint64_t size)
{
    (void)data, (void)size;
    free_slots[handle]++;
}

static int statm;
static uint64_t resident_before;
static int (*mallctl_found)(const char *, void *, size_t *, void *, size_t);

static uint64_t resident(void)
{
    char text[128] = "";
    if (pread(statm, text, sizeof text - 1, 0) <= 0)
        fail("cannot read /proc/self/statm");
    return strtoull(strchr(text, ' '), NULL, 10) * (uint64_t)sysconf(_SC_PAGESIZE);
}

static void malloc_step(uint64_t bytes)
{
    (void)bytes;
    raise_to(&peak, resident() - resident_before);
    if (mallctl_found) {
        uint64_t epoch = 1;
        size_t mapped = 0, size = sizeof epoch, size_mapped = sizeof mapped;
        if (mallctl_found("epoch", &epoch, &size, &epoch, size) == 0 &&
            mallctl_found("stats.mapped", &mapped, &size_mapped, NULL, 0) == 0)
            raise_to(&span, mapped);
    } else if (calls % 64 == 0) {
        struct mallinfo2 info = mallinfo2(); /* walks all free chunks */
        raise_to(&span, info.arena + info.hblkhd);
    }
}

static void malloc_start(const char *directory)
{
    (void)directory;
    *(void **)&mallctl_found = dlsym(RTLD_DEFAULT, "mallctl");
    if ((statm = open("/proc/self/statm", O_RDONLY | O_CLOEXEC)) < 0)
        fail("cannot open /proc/self/statm");
    resident_before = resident();
}

static uint64_t malloc_write(const uint8_t *data, uint64_t size)
{
    void *at = alignment <= 16 ? malloc(size) : aligned_alloc(alignment, round_up(size));
    if (!at)
        fail("no memory");
    memcpy(at, data, size);
    return (uint64_t)(uintptr_t)at;
}

static void malloc_drop(uint64_t handle, const uint8_t *data, uint64_t size)
{
    void *at = (void *)(uintptr_t)handle;
    if (memcmp(at, data, size) != 0)
        fail("a value has changed");
    free(at);
}

static const struct {
    const char *name;
    allocator_t does;
} allocators[] = {
    {"region", {region_start, region_write, region_drop, region_step}},
    {"compact", {region_start, region_write, region_drop, compact_step}},
    {"naive", {naive_start, naive_write, naive_drop, NULL}},
    {"malloc", {malloc_start, malloc_write, malloc_drop, malloc_step}},
};

/* ---- the trace ---- */

static void drop_one(const allocator_t *allocator)
{
    value_t *value = &values[random_below(value_count)];
    allocator->drop(value->handle, pattern + value->stamp, value->size);
    live -= value->size;
    padded -= round_up(value->size);
    *value = values[--value_count];
}

static void write_until(const allocator_t *allocator, uint64_t end, uint64_t most, uint64_t from, uint64_t to)
{
    static uint64_t since;
    while (written < end) {
        const uint64_t size = from + random_below(to - from + 1);
        while (live + size > most)
            drop_one(allocator);
        if (value_count == value_room)
            fail("more values than expected");
        const uint32_t stamp = (uint32_t)random_below(LONGEST);
        values[value_count++] = (value_t){allocator->write(pattern + stamp, size), (uint32_t)size, stamp};
        written += size;
        live += size;
        padded += round_up(size);
        raise_to(&most_padded, padded);
        if ((since += size) >= STEP && allocator->step) {
            allocator->step(since);
            calls++;
            since = 0;
        }
    }
}

int main(int argc, char **argv)
{
    if (argc < 12)
        fail("usage: replay ALLOCATOR FROM TO DELETE FROM2 TO2 LIVE FILL TOTAL ALIGNMENT SEED [DIRECTORY]");
    const allocator_t *allocator = NULL;
    for (size_t i = 0; i < sizeof allocators / sizeof *allocators; i++)
        if (strcmp(argv[1], allocators[i].name) == 0)
            allocator = &allocators[i].does;
    uint64_t n[10];
    for (int i = 0; i < 10; i++)
        n[i] = strtoull(argv[i + 2], NULL, 10);
    const uint64_t from = n[0], to = n[1], share = n[2], from2 = n[3], to2 = n[4], most = n[5], fill = n[6],
                   total = n[7];
    alignment = n[8];
    if (!allocator || !alignment || from > to || from2 > to2 || !from || to2 > LONGEST || to > LONGEST)
        fail("bad argument");

    prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0); /* a huge page would count as resident whole */
    value_room = most / (from < from2 ? from : from2) + 1;
    values = pages(value_room * sizeof *values);
    pattern = pages(2 * LONGEST);
    rng = 0x9E3779B97F4A7C15u ^ n[9];
    for (int i = 0; i < 2 * LONGEST; i++)
        pattern[i] = (uint8_t)random_below(256);
    allocator->start(argc > 12 ? argv[12] : NULL);

    const double begin = now();
    write_until(allocator, fill, most, from, to);
    for (uint64_t gone = value_count * share / 100; gone > 0; gone--)
        drop_one(allocator);
    write_until(allocator, total, most, from2, to2);
    const double end = now();
    if (region && ndm_region_check(region) != 0)
        fail("the region is broken");
    printf("{\"peak\": %llu, \"span\": %llu, \"floor\": %llu, \"metadata\": %llu, \"written\": %llu, \"moved\": %llu, "
           "\"calls\": %llu, \"seconds\": %.3f}\n",
           (unsigned long long)peak, (unsigned long long)span, (unsigned long long)most_padded,
           (unsigned long long)metadata, (unsigned long long)written, (unsigned long long)moved,
           (unsigned long long)calls, (end - begin) / 1e6);
    ndm_region_destroy(region);
    return 0;
}
