/* What a release + find + take costs, by the number of free extents.
 *
 *   cc -std=c11 -O2 -Icsrc benchmarks/native/bench_extents.c csrc/store/extents?*.c csrc/store/extents.c -o bench_extents && ./bench_extents
 *
 * The space is built from used extents; every fourth one is then released, so the holes lie apart, scattered over
 * the space. Two loads, each of pairs "release a random used extent; find and take a random length":
 *   walled   lengths of 1 to 256 units; every other used extent stays for good: few holes join, most fits are exact;
 *   churn    the hard case: lengths of 1 to 64 N units, so few are equal and the tries are deep; any used extent may
 *            go, so holes join and split all the time. Between the batches, untimed, the number of holes is steered
 *            towards N by releasing or taking some more.
 * A batch is 1000 pairs, timed as a whole; the figure is the median over the batches. */
#define _GNU_SOURCE
#include "store/extents.h"
#include "timing.h"

enum { BATCH = 1000, BATCHES = 401 };

static uint64_t longest;
static uint32_t *movable; /* the used extents that may be released */
static uint64_t movable_count, movable_room;

static uint32_t take(ndm_i_extents *extents, uint64_t length)
{
    if (!ndm_i_extents_reserve(extents))
        fail("out of memory");
    return ndm_i_extents_take(extents, ndm_i_extents_find(extents, length), length, 0);
}

static uint64_t random_length(void)
{
    return 1 + random_below(longest);
}

static void pairs(ndm_i_extents *extents, int count)
{
    for (int i = 0; i < count; i++) {
        uint32_t *victim = &movable[random_below(movable_count)];
        ndm_i_extents_release(extents, *victim);
        *victim = take(extents, random_length());
    }
}

/* The number of holes follows the number of used extents, with some delay. */
static void keep_count(ndm_i_extents *extents, uint64_t holes)
{
    for (uint64_t count = holes; count + 8 < extents->free_count && movable_count > 1; count += 8) {
        uint32_t *victim = &movable[random_below(movable_count)];
        ndm_i_extents_release(extents, *victim);
        *victim = movable[--movable_count];
    }
    for (uint64_t count = extents->free_count; count + 8 < holes && movable_count < movable_room; count += 8)
        movable[movable_count++] = take(extents, random_length());
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void measure(uint64_t holes, bool walled)
{
    static double ns[BATCHES];
    ndm_i_extents extents;
    ndm_i_extents_init(&extents);
    longest = walled ? 256 : 64 * holes;
    uint64_t total = 4 * holes;
    movable_room = 2 * total;
    movable = malloc(movable_room * sizeof *movable);
    uint32_t *doomed = malloc(total * sizeof *doomed);
    uint64_t doomed_count = 0;
    if (movable == NULL || doomed == NULL)
        fail("out of memory");
    movable_count = 0;
    for (uint64_t i = 0; i < total; i++) {
        uint32_t extent = take(&extents, random_length());
        if (i % 4 == 1)
            doomed[doomed_count++] = extent;
        else if (!walled || i % 2 == 1)
            movable[movable_count++] = extent;
    }
    for (; doomed_count > 0; doomed_count--) {
        uint64_t i = random_below(doomed_count);
        ndm_i_extents_release(&extents, doomed[i]);
        doomed[i] = doomed[doomed_count - 1];
    }
    free(doomed);

    for (uint64_t i = 0; i < 4 * holes / BATCH + 100; i++) {
        pairs(&extents, BATCH);
        if (!walled)
            keep_count(&extents, holes);
    }
    for (int batch = 0; batch < BATCHES; batch++) {
        const double begin = now();
        pairs(&extents, BATCH);
        ns[batch] = (now() - begin) * 1e3 / BATCH;
        if (!walled)
            keep_count(&extents, holes);
    }
    qsort(ns, BATCHES, sizeof *ns, by_value);
    printf("%-6s N=%-8llu %6.1f ns a pair (p10 %.1f, p90 %.1f), %llu holes, %u nodes, mark %llu\n",
           walled ? "walled" : "churn", (unsigned long long)holes, ns[BATCHES / 2], ns[BATCHES / 10],
           ns[BATCHES * 9 / 10], (unsigned long long)extents.free_count, extents.node_count - extents.spare_count,
           (unsigned long long)extents.mark);
    free(movable);
    ndm_i_extents_fini(&extents);
}

int main(void)
{
    static const uint64_t holes[] = {100, 10000, 1000000};
    for (int walled = 1; walled >= 0; walled--)
        for (int i = 0; i < 3; i++)
            measure(holes[i], walled);
    return 0;
}
