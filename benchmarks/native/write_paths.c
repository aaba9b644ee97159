/* What the thresholds in csrc/store rest on: the ways into a file, bare, without the core.
 *
 *   cc -std=c11 -O2 -pthread -Icsrc benchmarks/native/write_paths.c -o write_paths && ./write_paths DIRECTORY [ROUNDS]
 *
 * Prints Markdown tables of us per MiB, medians of interleaved rounds. Every pass but the warm ones has a fresh file,
 * whose creation, sizing and mapping are not timed; what a way asks of the file system on the way is. */
#define _GNU_SOURCE
#include "timing.h"

#include <fcntl.h>
#include <unistd.h>

#define KIB ((size_t)1 << 10)
#define MIB ((size_t)1 << 20)
#define TOTAL (64 * MIB)  /* written in a pass */
#define STEP (16 * MIB)   /* fallocate()d at a time, as in csrc/store/store.c */
#define GRAIN (512 * KIB) /* zeroed at a time, and the longest pwrite(), as there */
#define PAGE (4 * KIB)

enum { WARM_UP_GIB = 6, MOST_ROUNDS = 99 };

static const char *directory;
static int rounds = 9;

typedef struct {
    int fd;
    uint8_t *base;
} file;

/* `advised`: as the core maps it. It matters to faults in holes, which then bring one page, not a large folio. */
static file fresh(bool advised)
{
    file f = {.fd = open(directory, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600)};
    check(f.fd >= 0, "open");
    check(ftruncate(f.fd, TOTAL + PAGE) == 0, "ftruncate");
    f.base = mmap(NULL, TOTAL + PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, f.fd, 0);
    check(f.base != MAP_FAILED, "mmap");
    if (advised)
        madvise(f.base, TOTAL + PAGE, MADV_RANDOM);
    return f;
}

static void finish(file f)
{
    munmap(f.base, TOTAL + PAGE);
    close(f.fd);
}

static void put(file f, const uint8_t *data, size_t size, size_t offset)
{
    while (size > 0) {
        const size_t left = GRAIN - offset % GRAIN, piece = size < left ? size : left;
        check(pwrite(f.fd, data, piece, (off_t)offset) == (ssize_t)piece, "pwrite");
        data += piece;
        size -= piece;
        offset += piece;
    }
}

/* Out of RAM, on disk. */
static void drop(file f, size_t size)
{
    check(sync_file_range(f.fd, 0, (off_t)size, 7) == 0, "sync_file_range");
    madvise(f.base, size, MADV_DONTNEED);
    posix_fadvise(f.fd, 0, (off_t)size, POSIX_FADV_DONTNEED);
}

/* ---- cold space: each fills TOTAL with values of `size` ------------------------------------------------------- */

typedef void way(file f, const uint8_t *value, size_t size);

static void by_memcpy(file f, const uint8_t *value, size_t size)
{
    for (size_t at = 0; at < TOTAL; at += size)
        memcpy(f.base + at, value, size);
}

static void allocate(file f, size_t end, size_t *allocated)
{
    for (; *allocated < end; *allocated += STEP)
        check(fallocate(f.fd, 0, (off_t)*allocated, (off_t)STEP) == 0, "fallocate");
}

static void by_allocated(file f, const uint8_t *value, size_t size)
{
    for (size_t at = 0, allocated = 0; at < TOTAL; at += size) {
        allocate(f, at + size, &allocated);
        memcpy(f.base + at, value, size);
    }
}

static void by_populated(file f, const uint8_t *value, size_t size)
{
    for (size_t at = 0, allocated = 0, ready = 0; at < TOTAL; at += size) {
        allocate(f, at + size, &allocated);
        for (; ready < at + size; ready += GRAIN)
            madvise(f.base + ready, GRAIN, MADV_POPULATE_WRITE);
        memcpy(f.base + at, value, size);
    }
}

static void by_zeroed(file f, const uint8_t *value, size_t size)
{
    static const uint8_t zeros[GRAIN];
    for (size_t at = 0, allocated = 0, ready = 0; at < TOTAL; at += size) {
        allocate(f, at + size, &allocated);
        for (; ready < at + size; ready += GRAIN)
            put(f, zeros, GRAIN, ready);
        memcpy(f.base + at, value, size);
    }
}

static void by_pwrite(file f, const uint8_t *value, size_t size)
{
    for (size_t at = 0, allocated = 0; at < TOTAL; at += size) {
        allocate(f, at + size, &allocated);
        put(f, value, size, at);
    }
}

static void by_odd_pwrite(file f, const uint8_t *value, size_t size)
{
    for (size_t at = 0, allocated = 0; at < TOTAL; at += size) {
        allocate(f, at + size, &allocated);
        put(f, value, size, at + 64);
    }
}

/* ---- measuring ------------------------------------------------------------------------------------------------ */

/* The i-th of `count` in an order that is drawn anew for each i = 0: what a way leaves behind (free pages in large or
 * small pieces) meets all others. */
static int turn(int i, int count)
{
    static int order[8];
    if (i == 0)
        for (int n = 0; n < count; n++) {
            const int other = (int)random_below((uint64_t)n + 1);
            order[n] = order[other];
            order[other] = n;
        }
    return order[i];
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *figures)
{
    qsort(figures, (size_t)rounds, sizeof *figures, by_value);
    return figures[rounds / 2];
}

static void header(const char *title, const char *const *columns, int count, const char *first)
{
    printf("\n## %s\n\n| %s |", title, first);
    for (int i = 0; i < count; i++)
        printf(" %s |", columns[i]);
    printf("\n| --- |");
    for (int i = 0; i < count; i++)
        printf(" ---: |");
    printf("\n");
}

static const char *label(size_t size)
{
    static char text[32];
    if (size >= MIB)
        snprintf(text, sizeof text, "%zu MiB", size / MIB);
    else if (size >= KIB)
        snprintf(text, sizeof text, "%zu KiB", size / KIB);
    else
        snprintf(text, sizeof text, "%zu B", size);
    return text;
}

static void row(size_t size, int count, double (*figures)[MOST_ROUNDS])
{
    printf("| %s |", label(size));
    for (int i = 0; i < count; i++) {
        const double figure = median(figures[i]);
        if (figure == 0) /* not tried */
            printf(" |");
        else
            printf(" %.*f |", figure < 10 ? 2 : 0, figure);
    }
    printf("\n");
    fflush(stdout);
}

static void measure_cold(const uint8_t *source)
{
    static const char *const names[] = {"sparse",    "allocated", "sparse, advised", "populated",
                                        "zeroed", "pwrite aligned", "pwrite at odd offsets"};
    static way *const ways[] = {by_memcpy, by_allocated, by_memcpy, by_populated, by_zeroed, by_pwrite, by_odd_pwrite};
    static const size_t sizes[] = {64, 4 * KIB, 16 * KIB, 32 * KIB, 64 * KIB, 128 * KIB, 256 * KIB, MIB, 16 * MIB};
    enum { WAYS = 7 };
    header("Cold space, us per MiB (the first five by memcpy, the last four into allocated space)", names, WAYS, "value");
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        static double figures[WAYS][MOST_ROUNDS];
        for (int r = 0; r < rounds; r++)
            for (int i = 0; i < WAYS; i++) {
                const int w = turn(i, WAYS);
                figures[w][r] = 0;
                if (sizes[s] < KIB && w >= 5) /* a system call for each 64 B: nobody's choice */
                    continue;
                file f = fresh(w > 1);
                const double begin = now();
                ways[w](f, source, sizes[s]);
                figures[w][r] = (now() - begin) / (TOTAL / MIB);
                finish(f);
            }
        row(sizes[s], WAYS, figures);
    }
}

/* How much to zero at a time. */
static void measure_grains(const uint8_t *source)
{
    static const char *const names[] = {"zeroed 64 KiB", "128 KiB", "256 KiB", "512 KiB", "1 MiB", "2 MiB", "4 MiB"};
    static const size_t sizes[] = {64, 4 * KIB, 64 * KIB};
    enum { WAYS = 7 };
    uint8_t *zeros = calloc(4, MIB);
    check(zeros != NULL, "calloc");
    header("Zeroing ahead of memcpy, by piece, us per MiB", names, WAYS, "value");
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        static double figures[WAYS][MOST_ROUNDS];
        for (int r = 0; r < rounds; r++)
            for (int i = 0; i < WAYS; i++) {
                const int w = turn(i, WAYS);
                const size_t piece = (64 * KIB) << w;
                file f = fresh(true);
                const double begin = now();
                for (size_t at = 0, allocated = 0, ready = 0; at < TOTAL; at += sizes[s]) {
                    allocate(f, at + sizes[s], &allocated);
                    for (; ready < at + sizes[s]; ready += piece)
                        check(pwrite(f.fd, zeros, piece, (off_t)ready) == (ssize_t)piece, "pwrite");
                    memcpy(f.base + at, source, sizes[s]);
                }
                figures[w][r] = (now() - begin) / (TOTAL / MIB);
                finish(f);
            }
        row(sizes[s], WAYS, figures);
    }
    free(zeros);
}

static void measure_dropped(const uint8_t *source)
{
    static const char *const names[] = {"memcpy", "pwrite aligned", "pwrite at odd offsets"};
    static const size_t sizes[] = {4 * KIB, 64 * KIB, MIB};
    enum { WAYS = 3 };
    const size_t total = 4 * MIB;
    header("Space whose cache was dropped, us per MiB", names, WAYS, "value");
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        static double figures[WAYS][MOST_ROUNDS];
        for (int r = 0; r < rounds; r++)
            for (int i = 0; i < WAYS; i++) {
                const int w = turn(i, WAYS);
                file f = fresh(true);
                by_pwrite(f, source, GRAIN);
                drop(f, TOTAL);
                const double begin = now();
                for (size_t at = 0; at < total; at += sizes[s])
                    if (w == 0)
                        memcpy(f.base + at, source, sizes[s]);
                    else
                        put(f, source, sizes[s], w == 1 ? at : at + 64);
                figures[w][r] = (now() - begin) / (double)(total / MIB);
                finish(f);
            }
        row(sizes[s], WAYS, figures);
    }
}

/* A store to each page of the file, by what its pages are to this process. */
static void measure_faults(const uint8_t *source)
{
    static const char *const names[] = {"mapped writable",      "pwritten, not mapped",    "read before, dirty",
                                        "read before, written back", "not mapped, written back"};
    enum { WAYS = 5 };
    header("A store to each 4 KiB page, us", names, WAYS, "pages");
    static double figures[WAYS][MOST_ROUNDS];
    for (int r = 0; r < rounds; r++)
        for (int i = 0; i < WAYS; i++) {
            const int w = turn(i, WAYS);
            file f = fresh(true);
            volatile uint8_t *base = f.base;
            by_pwrite(f, source, GRAIN);
            if (w >= 3)
                check(sync_file_range(f.fd, 0, TOTAL, 7) == 0, "sync_file_range");
            for (size_t at = 0; at < TOTAL && (w == 0 || w == 2 || w == 3); at += PAGE) {
                (void)base[at];
                if (w == 0)
                    base[at] = 1;
            }
            const double begin = now();
            for (size_t at = 0; at < TOTAL; at += PAGE)
                base[at] = 2;
            figures[w][r] = (now() - begin) / (TOTAL / PAGE);
            finish(f);
        }
    row(PAGE, WAYS, figures);
}

/* All pages were mapped for writing, and have been written back since. A folio is as large as the write that made it. What
 * the file system knows of all of them is more than the processor's caches hold. */
static void measure_written_back(const uint8_t *source)
{
    static const char *const names[] = {"memcpy of 100 B at random", "pwrite of 100 B at random", "a grain mapped anew"};
    static const size_t sizes[] = {4 * KIB, 16 * KIB, 32 * KIB, 64 * KIB, 128 * KIB, GRAIN};
    enum { WAYS = 3, FILES = 8, STORES = 8192, SIZE = 100, UNIT = 128 };
    header("Space that was written back, us", names, WAYS, "folios");
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        static double figures[WAYS][MOST_ROUNDS];
        for (int r = 0; r < rounds; r++)
            for (int i = 0; i < WAYS; i++) {
                const int w = turn(i, WAYS);
                file files[FILES];
                for (int f = 0; f < FILES; f++) {
                    files[f] = fresh(true);
                    by_pwrite(files[f], source, sizes[s]);
                    by_memcpy(files[f], source, PAGE);
                    check(sync_file_range(files[f].fd, 0, TOTAL, 7) == 0, "sync_file_range");
                }
                const double begin = now();
                for (int n = 0; n < STORES; n++) {
                    const file f = files[random_below(FILES)];
                    const size_t at = random_below(TOTAL / UNIT) * UNIT;
                    if (w == 0)
                        memcpy(f.base + at, source, SIZE);
                    else if (w == 1)
                        put(f, source, SIZE, at);
                    else if (n < FILES * (int)(TOTAL / GRAIN)) {
                        uint8_t *grain = files[n % FILES].base + (size_t)n / FILES * GRAIN;
                        madvise(grain, GRAIN, MADV_DONTNEED);
                        madvise(grain, GRAIN, MADV_POPULATE_WRITE);
                    }
                }
                figures[w][r] = (now() - begin) / (w == 2 ? FILES * TOTAL / GRAIN : STORES);
                for (int f = 0; f < FILES; f++)
                    finish(files[f]);
            }
        row(sizes[s], WAYS, figures);
    }
}

/* What asking for pages costs that are there, against the faults it may save. */
static void measure_fetch(const uint8_t *source)
{
    static const char *const names[] = {"madvise, in RAM", "touch, in RAM", "touch, dropped", "madvise and touch, dropped"};
    static const size_t sizes[] = {4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB};
    enum { WAYS = 4 };
    header("Fetching a value, us per value", names, WAYS, "value");
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        static double figures[WAYS][MOST_ROUNDS];
        for (int r = 0; r < rounds; r++)
            for (int i = 0; i < WAYS; i++) {
                const int w = turn(i, WAYS);
                file f = fresh(true);
                volatile uint8_t *base = f.base;
                const size_t apart = sizes[s] > 256 * KIB ? 4 * sizes[s] : MIB;
                by_pwrite(f, source, GRAIN);
                if (w >= 2)
                    drop(f, TOTAL);
                const double begin = now();
                for (size_t at = 0; at < TOTAL; at += apart) {
                    if (w == 0 || w == 3)
                        madvise(f.base + at, sizes[s], MADV_WILLNEED);
                    for (size_t page = 0; w != 0 && page < sizes[s]; page += PAGE)
                        (void)base[at + page];
                }
                figures[w][r] = (now() - begin) / (double)(TOTAL / apart);
                finish(f);
            }
        row(sizes[s], WAYS, figures);
    }
}

/* ---- warm space: pages that are in RAM ------------------------------------------------------------------------ */

static void measure_warm(const uint8_t *source)
{
    static const char *const names[] = {"memcpy between buffers", "pwrite", "memcpy into mapped pages", "memcpy, then MADV_DONTNEED"};
    static const size_t sizes[] = {4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 16 * MIB};
    enum { WAYS = 4 };
    uint8_t *buffer = memory(TOTAL);
    file f = fresh(true);
    by_pwrite(f, source, GRAIN);
    header("Warm space, us per MiB (the last two leave, or have had, pages in the RSS)", names, WAYS, "value");
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        static double figures[WAYS][MOST_ROUNDS];
        for (int r = 0; r < rounds; r++)
            for (int i = 0; i < WAYS; i++) {
                const int w = turn(i, WAYS);
                if (w == 2)
                    by_memcpy(f, source, GRAIN); /* maps them */
                const double begin = now();
                for (size_t at = 0; at < TOTAL; at += sizes[s]) {
                    if (w == 1)
                        put(f, source, sizes[s], at);
                    else
                        memcpy(w == 0 ? buffer + at : f.base + at, source, sizes[s]);
                    if (w == 3)
                        madvise(f.base + at, sizes[s], MADV_DONTNEED);
                }
                figures[w][r] = (now() - begin) / (TOTAL / MIB);
                madvise(f.base, TOTAL, MADV_DONTNEED);
            }
        row(sizes[s], WAYS, figures);
    }
    finish(f);
    munmap(buffer, TOTAL);
}

int main(int count, char **arguments)
{
    directory = count > 1 ? arguments[1] : ".";
    rounds = count > 2 ? atoi(arguments[2]) : rounds;
    check(rounds > 0 && rounds <= MOST_ROUNDS, "ROUNDS is 1 to 99");
    /* The first touch of a virtual machine's page is slow; all later figures have touched memory. */
    munmap(memory(WARM_UP_GIB * 1024 * MIB), WARM_UP_GIB * 1024 * MIB);
    uint8_t *source = memory(16 * MIB);
    printf("# Ways into a file\n\nMedians of %d interleaved rounds; `benchmarks/native/write_paths.c` tells more.\n", rounds);
    measure_cold(source);
    measure_grains(source);
    measure_dropped(source);
    measure_faults(source);
    measure_written_back(source);
    measure_fetch(source);
    measure_warm(source);
    return 0;
}
