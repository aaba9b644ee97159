/* What each verb costs in a region of many values: samples for benchmarks/scale.py.
 *
 *   cc -std=c11 -O2 -pthread -Icsrc benchmarks/native/scale.c $(find csrc/os csrc/store csrc/region csrc/native -name "*.c") -o scale
 *   ./scale DIRECTORY SIZE COUNT CACHE_LIMIT
 *
 * Fills a region with COUNT values of SIZE bytes; CACHE_LIMIT is in bytes, -1: none. Prints a line per step: its name and a
 * figure, nanoseconds a value unless scale.py says otherwise. The order is the same each time, and no order of the file. */
#define _GNU_SOURCE
#include "nodedb_mem.h"
#include "timing.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

enum { ENGINE = 1, MOST_READS = 2000000, MOST_LARGE_READS = 512, OPENINGS = 20 };

#define LARGE ((uint64_t)64 << 10)

static char path[4096], slots_path[4096 + 8], leases_path[4096 + 8];
static uint64_t size, count;
static uint8_t *source, *target;
static ndm_options options;

static void core(bool good)
{
    if (!good)
        fail(ndm_last_error()->message);
}

static void print(const char *step, double figure) { printf("%s %.3f\n", step, figure); }

/* ---- an order ----------------------------------------------------------------------------------------------------- */

/* A number below 2^bits for each number below 2^bits, all different, without any order. */
static uint64_t mix(uint64_t x, unsigned bits)
{
    const uint64_t mask = ((uint64_t)1 << bits) - 1;
    for (int round = 0; round < 3; round++) {
        x ^= x >> (bits / 2 + 1);
        x = (x * 0x9E3779B97F4A7C15u + 12345) & mask;
    }
    return x;
}

/* The i-th of `count` numbers in that order. */
static uint64_t scattered(uint64_t i)
{
    unsigned bits = 1;
    while ((uint64_t)1 << bits < count)
        bits++;
    do
        i = mix(i, bits);
    while (i >= count);
    return i;
}

/* ---- bookkeeping -------------------------------------------------------------------------------------------------- */

static uint64_t private_bytes(void)
{
    char line[256];
    unsigned long long kib = 0;
    FILE *status = fopen("/proc/self/status", "r");
    check(status != NULL, "/proc/self/status");
    while (fgets(line, sizeof line, status) && sscanf(line, "RssAnon: %llu", &kib) != 1)
        ;
    fclose(status);
    return kib << 10;
}

static uint64_t disk_bytes(const char *name)
{
    struct stat facts;
    check(stat(name, &facts) == 0, name);
    return (uint64_t)facts.st_blocks * 512;
}

/* ---- the steps ---------------------------------------------------------------------------------------------------- */

static ndm_region *fill(void)
{
    ndm_region *region = ndm_region_open(path, &options);
    core(region != NULL);
    const uint64_t before = private_bytes();
    const double begin = now();
    for (uint64_t i = 0; i < count; i++)
        core(ndm_region_write(region, source, size, ENGINE) >= 0);
    print("write", (now() - begin) * 1e3 / (double)count);
    print("bookkeeping", (double)(private_bytes() - before + disk_bytes(slots_path)) / (double)count);
    return region;
}

/* Copies at random; and the same by memcpy from a mapping of the file, if that is in RAM. */
static void read_at_random(ndm_region *region, uint64_t stride)
{
    const uint64_t most = size < LARGE ? MOST_READS : MOST_LARGE_READS, reads = count < most ? count : most;
    double begin = now();
    for (uint64_t i = 0; i < reads; i++)
        core(ndm_region_read_into(region, (int64_t)scattered(i), target, size) == (int64_t)size);
    print("read", (now() - begin) * 1e3 / (double)reads);
    if (options.cache_limit != UINT64_MAX)
        return;
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    check(fd >= 0, path);
    const uint8_t *base = mmap(NULL, count * stride, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
    check(base != MAP_FAILED, "mmap");
    begin = now();
    for (uint64_t i = 0; i < reads; i++)
        memcpy(target, base + scattered(i) * stride, size);
    print("memcpy", (now() - begin) * 1e3 / (double)reads);
    munmap((void *)base, count * stride);
    close(fd);
}

static void free_half(ndm_region *region, const char *step)
{
    const double begin = now();
    for (uint64_t i = 0; i < count / 2; i++)
        core(ndm_region_free(region, (int64_t)scattered(i)) == NDM_OK);
    if (step)
        print(step, (now() - begin) * 1e3 / (double)(count / 2));
}

static void rewrite_half(ndm_region *region)
{
    const double begin = now();
    for (uint64_t i = 0; i < count / 2; i++)
        core(ndm_region_write(region, source, size, ENGINE) >= 0);
    print("rewrite", (now() - begin) * 1e3 / (double)(count / 2));
}

static void compact(ndm_region *region)
{
    ndm_compaction done;
    const double begin = now();
    core(ndm_region_compact(region, UINT64_MAX, &done) == NDM_OK);
    print("compact", (now() - begin) * 1e3 / (double)(count - count / 2));
    core(done.remaining_bytes == 0);
}

static void close_region(ndm_region *region, const char *step)
{
    const double begin = now();
    ndm_region_destroy(region);
    if (step)
        print(step, (now() - begin) * 1e3 / (double)(count - count / 2));
}

static ndm_region *recover(void)
{
    ndm_info info;
    options.recover = 1;
    const double begin = now();
    ndm_region *region = ndm_region_open(path, &options);
    core(region != NULL);
    print("recover", (now() - begin) * 1e3 / (double)(count - count / 2));
    core(ndm_region_info(region, &info) == NDM_OK && info.live_slots == count - count / 2);
    return region;
}

/* Microseconds of an opening, its first look, and the close. */
static void open_readers(void)
{
    ndm_value value;
    const double begin = now();
    for (int i = 0; i < OPENINGS; i++) {
        ndm_reader *reader = ndm_reader_open(path, slots_path, leases_path);
        core(reader != NULL && ndm_reader_find(reader, (int64_t)scattered(count - 1), -1, &value) == NDM_OK);
        ndm_reader_destroy(reader);
    }
    print("reader", (now() - begin) / OPENINGS);
}

int main(int argc, char **arguments)
{
    if (argc != 5)
        fail("usage: scale DIRECTORY SIZE COUNT CACHE_LIMIT");
    setvbuf(stdout, NULL, _IOLBF, 0);
    size = strtoull(arguments[2], NULL, 10);
    count = strtoull(arguments[3], NULL, 10);
    check(size > 0 && count > 1, "SIZE and COUNT");
    if (snprintf(path, sizeof path, "%s/scale", arguments[1]) >= (int)sizeof path)
        fail("the directory's name is too long");
    snprintf(slots_path, sizeof slots_path, "%s.slots", path);
    snprintf(leases_path, sizeof leases_path, "%s.leases", path);
    const uint64_t stride = (size + 63) / 64 * 64;
    options = (ndm_options){.initial_capacity = (uint64_t)64 << 20,
                            .max_capacity = ((uint64_t)64 << 20) + count * stride * 2,
                            .alignment = 64,
                            .cache_limit = strtoull(arguments[4], NULL, 10)};
    source = memory((size + 7) / 8 * 8);
    target = memory((size + 7) / 8 * 8);
    ndm_region *region = fill();
    read_at_random(region, stride);
    free_half(region, "free");
    rewrite_half(region);
    free_half(region, NULL);
    compact(region);
    close_region(region, "close");
    region = recover();
    open_readers();
    close_region(region, NULL);
    unlink(path);
    unlink(slots_path);
    unlink(leases_path);
    return 0;
}
