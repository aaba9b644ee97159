/* What a ndm_region_free() + ndm_region_write() pair costs, by the number of free extents.
 *
 *   bench_free_write FROM TO ALIGNMENT HOLES [DIRECTORY]     prints a line of JSON; without DIRECTORY in memory
 *
 * Sizes are FROM to TO bytes, uniform up to 16 * FROM and log-uniform above. The space is filled with values; every
 * second one is a wall of FROM bytes that stays; half of the others are then freed in random order, so that HOLES free
 * extents of mixed sizes lie apart. A pair frees a random value and writes one of a random size. The number of holes
 * is steered back to HOLES between the batches, untimed.
 *
 * `pair_ns` is the whole pair, `copy_ns` the part that no allocator can avoid: as many bytes of the same sizes copied
 * to values at random places of the region, through pointers into its mapping, cold as a written value is. The
 * difference, `book_ns`, is the bookkeeping. `read_ns` tells what memory of that size costs: one read in a chain of reads
 * at random among as many cache lines as there are free extents. A batch is 500 pairs; the two kinds of batch take turns; figures are
 * medians over the batches. */
#define _GNU_SOURCE
#include "region/ledger.h" /* for the number of holes, which is not public */
#include "timing.h"

#include <math.h>

enum { BATCH = 500, BATCHES = 301, LONGEST = 1 << 20 };

static uint64_t from, to;
static char data[LONGEST];
static ndm_region *region;
static int64_t *movable;
static uint64_t movable_count, movable_room;

static uint64_t random_size(void)
{
    if (to <= 16 * from)
        return from + random_below(to - from + 1);
    return (uint64_t)((double)from * pow((double)to / (double)from, (double)random_below(1 << 30) / (1 << 30)));
}

static int64_t write_value(uint64_t size)
{
    const int64_t slot = ndm_region_write(region, data, size, 0);
    if (slot < 0)
        fail(ndm_last_error()->message);
    return slot;
}

static uint64_t hole_count(void) { return region->extents.free_count; }

static void keep_count(uint64_t holes)
{
    for (uint64_t count = holes; count + 8 < hole_count() && movable_count < movable_room; count += 8)
        movable[movable_count++] = write_value(random_size());
    for (uint64_t count = hole_count(); count + 8 < holes && movable_count > 1; count += 8) {
        int64_t *victim = &movable[random_below(movable_count)];
        ndm_region_free(region, *victim);
        *victim = movable[--movable_count];
    }
}

/* The sizes are drawn before the clock starts: pow() is not what is measured. */
static double pairs(void)
{
    uint64_t sizes[BATCH];
    for (int i = 0; i < BATCH; i++)
        sizes[i] = random_size();
    const double begin = now();
    for (int i = 0; i < BATCH; i++) {
        int64_t *victim = &movable[random_below(movable_count)];
        ndm_region_free(region, *victim);
        *victim = write_value(sizes[i]);
    }
    return (now() - begin) * 1e3 / BATCH;
}

static double copies(void)
{
    const char *views[BATCH];
    uint64_t sizes[BATCH];
    for (int i = 0; i < BATCH; i++)
        views[i] = ndm_region_read(region, movable[random_below(movable_count)], &sizes[i]);
    const double begin = now();
    for (int i = 0; i < BATCH; i++)
        memcpy((char *)views[i], data, sizes[i]); /* what is there already */
    const double spent = (now() - begin) * 1e3 / BATCH;
    for (int i = 0; i < BATCH; i++)
        ndm_view_release(views[i]);
    return spent;
}

static double reads(uint64_t count)
{
    struct line {
        uint64_t next, rest[7];
    } *lines = aligned_alloc(64, count * sizeof *lines);
    if (!lines)
        fail("no memory");
    for (uint64_t i = 0; i < count; i++)
        lines[i].next = i;
    for (uint64_t i = count - 1; i > 0; i--) { /* one cycle through all: Sattolo */
        const uint64_t other = random_below(i), next = lines[i].next;
        lines[i].next = lines[other].next;
        lines[other].next = next;
    }
    enum { READS = 1000000 };
    uint64_t at = 0;
    const double begin = now();
    for (int i = 0; i < READS; i++)
        at = lines[at].next;
    const double spent = (now() - begin) * 1e3 / READS;
    if (at >= count)
        fail("a chain that leaves its array");
    free(lines);
    return spent;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double at_share(double *figures, double share)
{
    qsort(figures, BATCHES, sizeof *figures, by_value);
    return figures[(int)(share * (BATCHES - 1))];
}

int main(int argc, char **argv)
{
    static double pair_ns[BATCHES], copy_ns[BATCHES];
    if (argc < 5)
        fail("usage: bench_free_write FROM TO ALIGNMENT HOLES [DIRECTORY]");
    from = strtoull(argv[1], NULL, 10);
    to = strtoull(argv[2], NULL, 10);
    const uint64_t holes = strtoull(argv[4], NULL, 10);
    ndm_options options = {.initial_capacity = 1 << 20,
                           .max_capacity = (uint64_t)1 << 40,
                           .alignment = strtoull(argv[3], NULL, 10)};
    if (from == 0 || to < from || to > LONGEST || holes == 0)
        fail("bad argument");
    region = ndm_region_open_temporary(argc > 5 ? argv[5] : NULL, &options);
    if (!region)
        fail(ndm_last_error()->message);
    movable_room = 2 * holes + 100;
    movable = malloc(movable_room * sizeof *movable);
    int64_t *doomed = malloc(holes * sizeof *doomed);
    if (!movable || !doomed)
        fail("no memory");
    for (uint64_t i = 0; i < holes; i++) {
        doomed[i] = write_value(random_size());
        write_value(from);
        movable[movable_count++] = write_value(random_size());
        write_value(from);
    }
    for (uint64_t left = holes; left > 0; left--) {
        int64_t *victim = &doomed[random_below(left)];
        ndm_region_free(region, *victim);
        *victim = doomed[left - 1];
    }
    free(doomed);

    for (uint64_t i = 0; i < 2 * holes / BATCH + 100; i++) {
        pairs();
        keep_count(holes);
    }
    for (int batch = 0; batch < BATCHES; batch++) {
        pair_ns[batch] = pairs();
        keep_count(holes);
        copy_ns[batch] = copies();
    }
    const double pair = at_share(pair_ns, 0.5), copy = at_share(copy_ns, 0.5);
    ndm_stats stats;
    ndm_region_stats(region, &stats);
    printf("{\"holes\": %llu, \"pair_ns\": %.1f, \"pair_p10_ns\": %.1f, \"pair_p90_ns\": %.1f, \"copy_ns\": %.1f, "
           "\"book_ns\": %.1f, \"read_ns\": %.1f, \"used_bytes\": %llu, \"live_bytes\": %llu}\n",
           (unsigned long long)hole_count(), pair, at_share(pair_ns, 0.1), at_share(pair_ns, 0.9), copy, pair - copy, reads(holes),
           (unsigned long long)stats.used_bytes, (unsigned long long)stats.live_bytes);
    ndm_region_destroy(region);
    free(movable);
    return 0;
}
