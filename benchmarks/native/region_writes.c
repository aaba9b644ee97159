/* The core from C, beside a plain memcpy: samples for benchmarks/write_path.py.
 *
 *   cc -std=c11 -O2 -pthread -Icsrc benchmarks/native/region_writes.c $(find csrc/os csrc/store csrc/region -name "*.c") -o region_writes
 *   ./region_writes DIRECTORY [ROUNDS]
 *
 * Prints a line per sample: what, bytes of a value, rival, figure. The rivals take turns, round by round.
 *   cold   us per MiB, 64 MiB in values of one size into a region just opened, or by memcpy into a fresh sparse mapping
 *   warm   us per MiB, 256 MiB of sources: free and write again, into space that was stored to before, or by memcpy
 *          between two warm buffers
 *   price  us: open, the first write of 64 B, close; for a plain file: create + size + map, first store, unmap + close */
#define _GNU_SOURCE
#include "nodedb_mem.h"
#include "timing.h"

#include <fcntl.h>
#include <unistd.h>

#define KIB ((size_t)1 << 10)
#define MIB ((size_t)1 << 20)
#define COLD (64 * MIB)
#define WARM (256 * MIB)
#define WARM_UP (6 * 1024 * MIB)

enum { ENGINE = 1, OPENINGS = 10 };

static char path[4096], slots_path[4096 + 8];

static void core(bool good)
{
    if (!good)
        fail(ndm_last_error()->message);
}

static ndm_region *region_open(size_t capacity, size_t most)
{
    const ndm_options options = {
        .initial_capacity = capacity, .max_capacity = most, .alignment = 64, .cache_limit = UINT64_MAX};
    ndm_region *region = ndm_region_open(path, &options);
    core(region != NULL);
    return region;
}

static void region_close(ndm_region *region)
{
    ndm_region_destroy(region);
    unlink(path);
    unlink(slots_path);
}

static int plain_open(size_t size, uint8_t **base)
{
    int fd = open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0600);
    check(fd >= 0 && ftruncate(fd, (off_t)size) == 0, "open");
    *base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    check(*base != MAP_FAILED, "mmap");
    return fd;
}

static void plain_close(int fd, uint8_t *base, size_t size)
{
    munmap(base, size);
    close(fd);
    unlink(path);
}

static void print(const char *what, size_t size, const char *rival, double figure)
{
    printf("%s %zu %s %.4f\n", what, size, rival, figure);
}

/* ---- cold ----------------------------------------------------------------------------------------------------- */

static void cold_region(const uint8_t *source, size_t size)
{
    ndm_region *region = region_open(COLD, COLD);
    const double begin = now();
    for (size_t done = 0; done < COLD; done += size)
        core(ndm_region_write(region, source, size, ENGINE) >= 0);
    print("cold", size, "region", (now() - begin) / (COLD / MIB));
    region_close(region);
}

static void cold_memcpy(const uint8_t *source, size_t size)
{
    uint8_t *base;
    int fd = plain_open(COLD, &base);
    const double begin = now();
    for (size_t at = 0; at < COLD; at += size)
        memcpy(base + at, source, size);
    print("cold", size, "memcpy", (now() - begin) / (COLD / MIB));
    plain_close(fd, base, COLD);
}

/* ---- warm ----------------------------------------------------------------------------------------------------- */

static void warm(const uint8_t *source, size_t size, int rounds)
{
    uint8_t *target = memory(WARM);
    ndm_region *region = region_open(WARM, WARM);
    int64_t *slots = malloc(WARM / size * sizeof *slots);
    check(slots != NULL, "malloc");
    for (size_t i = 0; i < WARM / size; i++)
        core((slots[i] = ndm_region_write(region, source + i * size, size, ENGINE)) >= 0);
    for (int round = -1; round < rounds; round++) { /* the first maps what pwrite left unmapped */
        for (int turn = 0; turn < 2; turn++) {
            const bool ours = turn == (round & 1);
            const double begin = now();
            for (size_t i = 0; i < WARM / size; i++) {
                if (!ours) {
                    memcpy(target + i * size, source + i * size, size);
                    continue;
                }
                core(ndm_region_free(region, slots[i]) == NDM_OK);
                slots[i] = ndm_region_write(region, source + i * size, size, ENGINE);
                core(slots[i] >= 0);
            }
            if (round >= 0)
                print("warm", size, ours ? "region" : "memcpy", (now() - begin) / (WARM / MIB));
        }
    }
    free(slots);
    region_close(region);
    munmap(target, WARM);
}

/* ---- price ---------------------------------------------------------------------------------------------------- */

static void price_region(const uint8_t *source)
{
    const double begin = now();
    ndm_region *region = region_open(64 * MIB, 1024 * MIB);
    const double opened = now();
    core(ndm_region_write(region, source, 64, ENGINE) >= 0);
    const double first = now();
    core(ndm_region_write(region, source, 64, ENGINE) >= 0);
    const double second = now();
    ndm_region_close(region);
    const double closed = now();
    print("open", 64, "region", opened - begin);
    print("first", 64, "region", first - opened);
    print("second", 64, "region", second - first);
    print("close", 64, "region", closed - second);
    region_close(region);
}

static void price_memcpy(const uint8_t *source)
{
    uint8_t *base;
    const double begin = now();
    int fd = plain_open(64 * MIB, &base);
    const double opened = now();
    memcpy(base, source, 64);
    const double first = now();
    memcpy(base + 64, source, 64);
    const double second = now();
    munmap(base, 64 * MIB);
    close(fd);
    const double closed = now();
    print("open", 64, "memcpy", opened - begin);
    print("first", 64, "memcpy", first - opened);
    print("second", 64, "memcpy", second - first);
    print("close", 64, "memcpy", closed - second);
    unlink(path);
}

int main(int count, char **arguments)
{
    static const size_t sizes[] = {64, 4 * KIB, 16 * KIB, 64 * KIB, MIB, 16 * MIB};
    static const size_t warm_sizes[] = {64 * KIB, MIB, 16 * MIB};
    const char *directory = count > 1 ? arguments[1] : ".";
    const int rounds = count > 2 ? atoi(arguments[2]) : 9;
    if (snprintf(path, sizeof path, "%s/region_writes", directory) >= (int)sizeof path)
        return 2;
    snprintf(slots_path, sizeof slots_path, "%s.slots", path);
    /* The first touch of a virtual machine's page is slow; all figures are of memory that was touched. */
    munmap(memory(WARM_UP), WARM_UP);
    uint8_t *source = memory(WARM);
    for (int round = 0; round < rounds; round++) {
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
            /* Each follows itself as often as the other: freed pages come in larger pieces after the region. */
            const bool first = ((size_t)round ^ s) & 1;
            if (first)
                cold_region(source, sizes[s]);
            cold_memcpy(source, sizes[s]);
            if (!first)
                cold_region(source, sizes[s]);
        }
        for (int i = 0; i < OPENINGS; i++) {
            price_region(source);
            price_memcpy(source);
        }
    }
    for (size_t s = 0; s < sizeof warm_sizes / sizeof *warm_sizes; s++)
        warm(source, warm_sizes[s], rounds);
    return 0;
}
