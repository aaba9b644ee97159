/* What the timed programs share: a clock, warm memory, chance, and a way out. After _GNU_SOURCE. */
#ifndef TIMING_H
#define TIMING_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

static inline void fail(const char *what)
{
    fprintf(stderr, "%s: %s\n", program_invocation_short_name, what);
    exit(1);
}

/* For what sets errno. */
static inline void check(bool good, const char *what)
{
    if (good)
        return;
    fprintf(stderr, "%s: %s: %s\n", program_invocation_short_name, what, strerror(errno));
    exit(1);
}

static inline double now(void) /* us */
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec * 1e6 + (double)at.tv_nsec / 1e3;
}

/* Anonymous pages, each written to. */
static inline uint8_t *memory(size_t size)
{
    uint8_t *area = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(area != MAP_FAILED, "mmap");
    for (size_t i = 0; i < size; i += 8)
        memcpy(area + i, &(uint64_t){i * 0x9E3779B97F4A7C15}, 8);
    return area;
}

static uint64_t rng = 0x9E3779B97F4A7C15;

static inline uint64_t random_below(uint64_t bound)
{
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return (uint64_t)(((unsigned __int128)rng * bound) >> 64);
}

#endif
