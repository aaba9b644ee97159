/* The governor: limits, ceiling, headroom, over-commitment, slack of others, waiters, pressure, files, forks, deaths. */
#define _GNU_SOURCE
#include "check.h"
#include "governor/lock.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { KIB = 1 << 10, MIB = 1 << 20 };

static char directory[] = "/tmp/test-governor-XXXXXX", path[128];

static const ndm_governor_options plain = {
    .ceiling = 64 * MIB, .warning = 70, .critical = 85, .emergency = 95, .hysteresis = 5};

static ndm_governor *governor_of_three(void)
{
    ndm_governor *governor = ndm_governor_create(&plain);
    CHECK(governor);
    CHECK(ndm_governor_add_engine(governor, 0, 32 * MIB, 1) == NDM_OK);
    CHECK(ndm_governor_add_engine(governor, 1, 16 * MIB, 1) == NDM_OK);
    CHECK(ndm_governor_add_engine(governor, 255, 16 * MIB, 0) == NDM_OK);
    return governor;
}

static int is_refused(int status, uint64_t required, uint64_t allocated, uint64_t limit)
{
    const ndm_error *error = ndm_last_error();
    return status < 0 && error->status == status && error->required == required && error->allocated == allocated &&
           error->limit == limit;
}

static void limits_hold(void)
{
    ndm_governor *governor = governor_of_three();
    CHECK(ndm_governor_reserve(governor, 0, 32 * MIB) == NDM_OK);
    CHECK(is_refused(ndm_governor_reserve(governor, 0, 1), 1, 32 * MIB, 32 * MIB));
    CHECK(ndm_last_error()->status == NDM_ERR_BUDGET && ndm_last_error()->engine == 0);
    CHECK(ndm_governor_reserve(governor, 0, 0) == NDM_OK);
    CHECK(ndm_governor_reserve(governor, 7, 1) == NDM_ERR_ENGINE && ndm_last_error()->engine == 7);
    CHECK(ndm_governor_reserve(governor, 7, 0) == NDM_ERR_ENGINE);
    CHECK(ndm_governor_reserve(governor, 256, 1) == NDM_ERR_ARGUMENT);
    CHECK(ndm_governor_reserve(governor, -1, 1) == NDM_ERR_ARGUMENT);
    CHECK(ndm_governor_reserve(governor, 1, UINT64_MAX) == NDM_ERR_ARGUMENT);
    CHECK(ndm_governor_reserve(governor, 1, INT64_MAX) == NDM_ERR_BUDGET);
    CHECK(ndm_governor_reserve(NULL, 1, 1) == NDM_ERR_CLOSED);
    CHECK(ndm_governor_release(governor, 0, 32 * MIB + 1) == NDM_ERR_ARGUMENT);
    CHECK(ndm_governor_release(governor, 1, 1) == NDM_ERR_ARGUMENT);
    CHECK(ndm_governor_release(governor, 0, 32 * MIB) == NDM_OK);
    CHECK(ndm_governor_allocated(governor, 0) == 0 && ndm_governor_allocated(governor, -1) == 0);
    CHECK(ndm_governor_add_engine(governor, 3, 1, 1) == NDM_ERR_ARGUMENT); /* the limits are the ceiling already */
    CHECK(ndm_governor_add_engine(governor, 0, 32 * MIB, 1) == NDM_OK);
    CHECK(ndm_governor_add_engine(governor, 0, 31 * MIB, 1) == NDM_ERR_ARGUMENT);
    CHECK(ndm_governor_add_engine(governor, 0, 32 * MIB, 0) == NDM_ERR_ARGUMENT);
    CHECK(ndm_governor_set_limit(governor, 3, 1) == NDM_ERR_ENGINE);
    CHECK(ndm_governor_set_limit(governor, 0, 32 * MIB + 1) == NDM_ERR_ARGUMENT);
    CHECK(ndm_governor_check(governor) == 0);
    ndm_governor_destroy(governor);
}

static void a_lowered_limit_takes_nothing_away(void)
{
    ndm_governor *governor = governor_of_three();
    for (int i = 0; i < 20; i++)
        CHECK(ndm_governor_reserve(governor, 0, MIB) == NDM_OK);
    CHECK(ndm_governor_set_limit(governor, 0, 10 * MIB) == NDM_OK);
    CHECK(ndm_governor_allocated(governor, 0) == 20 * MIB);
    for (int i = 20; i > 10; i--) {
        CHECK(is_refused(ndm_governor_reserve(governor, 0, 1), 1, (uint64_t)i * MIB, 10 * MIB));
        CHECK(ndm_governor_release(governor, 0, MIB) == NDM_OK);
        CHECK(ndm_governor_check(governor) == 0);
    }
    CHECK(ndm_governor_reserve(governor, 0, 1) == NDM_ERR_BUDGET);
    CHECK(ndm_governor_release(governor, 0, MIB) == NDM_OK);
    CHECK(ndm_governor_reserve(governor, 0, MIB) == NDM_OK);
    CHECK(ndm_governor_set_ceiling(governor, 8 * MIB, 0) == NDM_OK);
    CHECK(is_refused(ndm_governor_reserve(governor, 1, 1), 1, 10 * MIB, 8 * MIB));
    CHECK(ndm_last_error()->status == NDM_ERR_CEILING);
    CHECK(ndm_governor_set_limit(governor, 0, 9 * MIB) == NDM_OK); /* lowering is allowed, whatever the sum */
    CHECK(ndm_governor_set_ceiling(governor, 8 * MIB, 9 * MIB) == NDM_ERR_ARGUMENT);
    CHECK(ndm_governor_set_ceiling(governor, 0, 0) == NDM_ERR_ARGUMENT);
    ndm_governor_destroy(governor);
}

static void slack_of_other_engines_is_no_obstacle(void)
{
    ndm_governor *governor = governor_of_three();
    CHECK(ndm_governor_set_ceiling(governor, 16 * MIB, 0) == NDM_OK);
    CHECK(ndm_governor_reserve(governor, 0, 16 * MIB) == NDM_OK && ndm_governor_release(governor, 0, 16 * MIB) == NDM_OK);
    for (int i = 0; i < 64; i++)
        CHECK(ndm_governor_reserve(governor, 0, 64 * KIB) == NDM_OK && ndm_governor_release(governor, 0, 64 * KIB) == NDM_OK);
    CHECK(ndm_governor_reserve(governor, 1, 16 * MIB) == NDM_OK);
    CHECK(ndm_governor_reserve(governor, 0, 1) == NDM_ERR_CEILING);
    CHECK(ndm_governor_check(governor) == 0);
    ndm_governor_destroy(governor);
}

static void headroom_is_left_by_the_spillable(void)
{
    ndm_governor *governor = governor_of_three();
    CHECK(ndm_governor_set_ceiling(governor, 40 * MIB, 10 * MIB) == NDM_OK);
    CHECK(ndm_governor_reserve(governor, 0, 20 * MIB) == NDM_OK);
    CHECK(ndm_governor_reserve(governor, 1, 10 * MIB) == NDM_OK);
    CHECK(is_refused(ndm_governor_reserve(governor, 0, 877), 877, 30 * MIB, 30 * MIB));
    CHECK(ndm_governor_reserve(governor, 255, 877) == NDM_OK);
    CHECK(ndm_governor_reserve(governor, 255, 10 * MIB - 877) == NDM_OK);
    CHECK(is_refused(ndm_governor_reserve(governor, 255, 1), 1, 40 * MIB, 40 * MIB));
    ndm_governor_destroy(governor);
}

static void a_charge_is_never_refused(void)
{
    ndm_governor *governor = governor_of_three();
    CHECK(ndm_governor_charge(governor, 1, 80 * MIB) == NDM_OK);
    CHECK(ndm_governor_allocated(governor, -1) == 80 * MIB && ndm_governor_check(governor) == 0);
    CHECK(ndm_governor_reserve(governor, 0, 1) == NDM_ERR_CEILING);
    CHECK(ndm_governor_release(governor, 1, 20 * MIB) == NDM_OK);
    CHECK(ndm_governor_reserve(governor, 1, 1) == NDM_ERR_BUDGET);
    CHECK(ndm_governor_reserve(governor, 0, 4 * MIB) == NDM_OK);
    CHECK(ndm_governor_reserve(governor, 0, 1) == NDM_ERR_CEILING);
    CHECK(ndm_governor_charge(governor, 9, 1) == NDM_ERR_ENGINE);
    CHECK(ndm_governor_charge(governor, 1, INT64_MAX) == NDM_ERR_ARGUMENT);
    CHECK(ndm_governor_check(governor) == 0);
    ndm_governor_destroy(governor);
}

static void pressure_rises_at_once_and_falls_late(void)
{
    ndm_governor *governor = governor_of_three();
    static const struct { int used, level; } steps[] = {{0, 0}, {69, 0}, {70, 1}, {66, 1}, {65, 1}, {64, 0}, {86, 2},
                                                        {81, 2}, {79, 1}, {99, 3}, {90, 3}, {89, 2}, {10, 0}};
    CHECK(ndm_governor_set_limit(governor, 0, 100) == NDM_OK);
    int used = 0;
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        if (steps[i].used > used)
            CHECK(ndm_governor_reserve(governor, 0, (uint64_t)(steps[i].used - used)) == NDM_OK);
        else
            CHECK(ndm_governor_release(governor, 0, (uint64_t)(used - steps[i].used)) == NDM_OK);
        used = steps[i].used;
        CHECK(ndm_governor_pressure(governor, 0) == steps[i].level);
    }
    CHECK(ndm_governor_pressure(governor, -1) == NDM_NORMAL);
    CHECK(ndm_governor_note_real(governor, 1, 96) == NDM_OK && ndm_governor_pressure(governor, -1) == NDM_EMERGENCY);
    CHECK(ndm_governor_pressure(governor, 9) == NDM_ERR_ENGINE && ndm_governor_pressure(governor, 256) == NDM_ERR_ARGUMENT);
    ndm_governor_destroy(governor);
}

/* ---- waiters --------------------------------------------------------------------------------------------- */

static void waiters_are_served_in_order(void)
{
    ndm_governor *governor = governor_of_three();
    CHECK(ndm_governor_reserve(governor, 0, 30 * MIB) == NDM_OK);
    CHECK(ndm_governor_queue(governor, 0, 33 * MIB) == NDM_ERR_BUDGET); /* never */
    CHECK(ndm_governor_queue(governor, 9, 1) == NDM_ERR_ENGINE);
    const int64_t large = ndm_governor_queue(governor, 0, 20 * MIB), small = ndm_governor_queue(governor, 0, MIB);
    CHECK(large > 0 && small > large && ndm_governor_check(governor) == 0);
    CHECK(ndm_governor_wait(governor, small, 0) == NDM_ERR_BUDGET && ndm_last_error()->waiting == 20 * MIB);
    CHECK(ndm_governor_wait(governor, large, 1000) == NDM_ERR_WAIT);
    CHECK(ndm_governor_reserve(governor, 0, MIB) == NDM_ERR_BUDGET); /* it would fit, and starve the large one */
    CHECK(ndm_governor_reserve(governor, 1, 16 * MIB) == NDM_OK);    /* another engine is not concerned */
    CHECK(ndm_governor_release(governor, 0, 18 * MIB) == NDM_OK);
    CHECK(ndm_governor_wait(governor, large, 0) == NDM_OK);
    CHECK(ndm_governor_wait(governor, large, 0) == NDM_ERR_ARGUMENT);
    CHECK(ndm_governor_wait(governor, small, 0) == NDM_ERR_BUDGET);
    ndm_governor_leave(governor, small);
    ndm_governor_leave(governor, small);
    CHECK(ndm_governor_check(governor) == 0);

    /* Who waits for the ceiling delays all. */
    CHECK(ndm_governor_set_ceiling(governor, 50 * MIB, 0) == NDM_OK);
    const int64_t third = ndm_governor_queue(governor, 255, 8 * MIB);
    CHECK(ndm_governor_wait(governor, third, 0) == NDM_ERR_CEILING);
    CHECK(ndm_governor_release(governor, 1, 4 * MIB) == NDM_OK);
    CHECK(ndm_governor_reserve(governor, 1, 4 * MIB) == NDM_ERR_CEILING);
    CHECK(ndm_governor_release(governor, 1, 4 * MIB) == NDM_OK);
    CHECK(ndm_governor_wait(governor, third, 0) == NDM_OK);
    CHECK(ndm_governor_check(governor) == 0);
    ndm_governor_destroy(governor);
}

static void *release_soon(void *governor)
{
    usleep(20000);
    CHECK(ndm_governor_release(governor, 0, 32 * MIB) == NDM_OK);
    return NULL;
}

static void a_release_wakes(void)
{
    ndm_governor *governor = governor_of_three();
    pthread_t thread;
    CHECK(ndm_governor_reserve(governor, 0, 32 * MIB) == NDM_OK);
    const int64_t ticket = ndm_governor_queue(governor, 0, MIB);
    CHECK(pthread_create(&thread, NULL, release_soon, governor) == 0);
    CHECK(ndm_governor_wait(governor, ticket, UINT64_C(60000000000)) == NDM_OK);
    pthread_join(thread, NULL);
    CHECK(ndm_governor_allocated(governor, 0) == MIB);
    ndm_governor_destroy(governor);
}

static void the_line_has_an_end(void)
{
    ndm_governor *governor = governor_of_three();
    for (int i = 0; i < NDM_I_WAITERS; i++)
        CHECK(ndm_governor_queue(governor, 0, MIB) == i + 1);
    CHECK(ndm_governor_queue(governor, 0, MIB) == NDM_ERR_IO && ndm_last_error()->os_errno == EAGAIN);
    for (int i = 0; i < NDM_I_WAITERS; i++)
        ndm_governor_leave(governor, i + 1);
    CHECK(ndm_governor_check(governor) == 0 && ndm_governor_reserve(governor, 0, MIB) == NDM_OK);
    ndm_governor_destroy(governor);
}

/* ---- numbers --------------------------------------------------------------------------------------------- */

static void a_number_ends_with_its_governor(void)
{
    ndm_governor *governor = governor_of_three();
    const uint64_t number = ndm_governor_handle(governor);
    CHECK(number != 0 && number == ndm_governor_handle(governor));
    CHECK(ndm_g_reserve(number, 0, MIB) == NDM_OK && ndm_g_allocated(number, -1) == MIB);
    CHECK(ndm_g_reserve(number, 0, 32 * MIB) == NDM_ERR_BUDGET);
    CHECK(ndm_g_charge(number, 0, 32 * MIB) == NDM_OK && ndm_g_pressure(number, 0) == NDM_EMERGENCY);
    CHECK(ndm_g_release(number, 0, 33 * MIB) == NDM_OK);
    CHECK(ndm_g_reserve(0, 0, 1) == NDM_ERR_CLOSED && ndm_g_reserve(UINT64_MAX, 0, 1) == NDM_ERR_CLOSED);
    CHECK(ndm_g_reserve(number ^ (UINT64_C(1) << 32), 0, 1) == NDM_ERR_CLOSED);
    ndm_governor_destroy(governor);
    CHECK(ndm_g_reserve(number, 0, 1) == NDM_ERR_CLOSED && ndm_g_pressure(number, 0) == NDM_ERR_CLOSED);
    governor = governor_of_three();
    const uint64_t other = ndm_governor_handle(governor);
    CHECK(other != 0 && other != number && ndm_g_reserve(number, 0, 1) == NDM_ERR_CLOSED);
    ndm_governor_destroy(governor);
    CHECK(ndm_governor_handle(NULL) == 0);
}

/* ---- forks ----------------------------------------------------------------------------------------------- */

static int child_of(void (*work)(ndm_governor *), ndm_governor *governor)
{
    int status;
    const pid_t child = fork();
    if (child == 0) {
        work(governor);
        _exit(0);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    return status;
}

static void start_anew(ndm_governor *governor)
{
    CHECK(ndm_governor_epoch(governor) == 1);
    CHECK(ndm_governor_allocated(governor, -1) == 0 && ndm_governor_check(governor) == 0);
    CHECK(ndm_governor_release(governor, 0, MIB) == NDM_ERR_ARGUMENT);
    CHECK(ndm_governor_reserve(governor, 0, 32 * MIB) == NDM_OK);
    CHECK(ndm_governor_reserve(governor, 0, 1) == NDM_ERR_BUDGET);
    ndm_governor_destroy(governor);
}

static void a_child_has_reserved_nothing(void)
{
    ndm_governor *governor = governor_of_three();
    CHECK(ndm_governor_reserve(governor, 0, 20 * MIB) == NDM_OK);
    CHECK(ndm_governor_queue(governor, 0, 20 * MIB) > 0);
    CHECK(ndm_governor_epoch(governor) == 0);
    CHECK(child_of(start_anew, governor) == 0);
    CHECK(ndm_governor_allocated(governor, 0) == 20 * MIB && ndm_governor_check(governor) == 0);
    ndm_governor_destroy(governor);
}

static void claim_of_its_own(ndm_governor *governor)
{
    static ndm_governor_figures figures;
    CHECK(ndm_governor_epoch(governor) == 1);
    CHECK(ndm_governor_allocated(governor, 0) == 20 * MIB); /* the parent's */
    CHECK(ndm_governor_release(governor, 0, MIB) == NDM_ERR_ARGUMENT);
    CHECK(ndm_governor_reserve(governor, 0, 12 * MIB) == NDM_OK);
    CHECK(ndm_governor_reserve(governor, 0, MIB) == NDM_ERR_BUDGET);
    CHECK(ndm_governor_snapshot(governor, &figures) == NDM_OK && figures.process_count == 2);
    CHECK(figures.processes[1].pid == (uint64_t)getpid() && figures.processes[1].allocated == 12 * MIB);
}

/* ---- shared ---------------------------------------------------------------------------------------------- */

static ndm_governor *open_shared(void)
{
    ndm_governor *governor = ndm_governor_open(path, &plain);
    CHECK(governor && ndm_governor_add_engine(governor, 0, 32 * MIB, 1) == NDM_OK);
    return governor;
}

static void one_ceiling_for_all(void)
{
    static ndm_governor_figures figures;
    struct stat facts;
    CHECK(ndm_governor_open(path, NULL) == NULL && ndm_last_error()->os_errno == ENOENT);
    ndm_governor *one = open_shared(), *two = open_shared();
    CHECK(stat(path, &facts) == 0 && (facts.st_mode & 0777) == 0600);
    CHECK(ndm_governor_reserve(one, 0, 20 * MIB) == NDM_OK);
    CHECK(ndm_governor_reserve(two, 0, 12 * MIB) == NDM_OK);
    CHECK(is_refused(ndm_governor_reserve(two, 0, 1), 1, 32 * MIB, 32 * MIB));
    CHECK(ndm_governor_release(two, 0, 13 * MIB) == NDM_ERR_ARGUMENT); /* that is the other's */
    CHECK(ndm_governor_release(one, 0, 20 * MIB) == NDM_OK);
    for (int i = 0; i < 20; i++) /* whatever `one` keeps ready */
        CHECK(ndm_governor_reserve(two, 0, MIB) == NDM_OK);
    CHECK(ndm_governor_check(one) == 0);
    CHECK(ndm_governor_snapshot(one, &figures) == NDM_OK && figures.allocated == 32 * MIB && figures.process_count == 2);
    ndm_governor *looking = ndm_governor_open(path, NULL);
    CHECK(looking && ndm_governor_snapshot(looking, &figures) == NDM_OK && figures.process_count == 2);
    ndm_governor_destroy(looking);
    ndm_governor_destroy(two);
    CHECK(ndm_governor_reserve(one, 0, 32 * MIB) == NDM_OK); /* what `two` held went with it */
    ndm_governor_options other = plain;
    other.ceiling = 65 * MIB;
    CHECK(ndm_governor_open(path, &other) == NULL && ndm_last_error()->status == NDM_ERR_ARGUMENT);
    other.adopt = 1;
    CHECK((two = ndm_governor_open(path, &other)) != NULL);
    CHECK(ndm_governor_snapshot(two, &figures) == NDM_OK && figures.ceiling == 64 * MIB);
    ndm_governor_destroy(one);
    ndm_governor_destroy(two);
    CHECK((two = ndm_governor_open(path, &other)) != NULL); /* nobody uses it any more */
    CHECK(ndm_governor_snapshot(two, &figures) == NDM_OK && figures.ceiling == 65 * MIB && figures.engine_count == 0);
    ndm_governor_destroy(two);
}

static void a_request_reaches_the_other(void)
{
    static uint64_t sizes[256];
    ndm_governor *one = open_shared(), *two = open_shared();
    CHECK(ndm_governor_ask(one, -1, MIB) == 0);
    CHECK(ndm_governor_reserve(two, 0, 4 * MIB) == NDM_OK && ndm_governor_reserve(one, 0, MIB) == NDM_OK);
    CHECK(!ndm_governor_is_asked(two) && ndm_governor_asked(two, sizes) == 0);
    CHECK(ndm_governor_ask(one, -1, 3 * MIB) == 1 && ndm_governor_is_asked(two) && !ndm_governor_is_asked(one));
    CHECK(ndm_governor_asked(two, sizes) == 1 && sizes[0] == 3 * MIB && !ndm_governor_is_asked(two));
    ndm_governor_destroy(one);
    ndm_governor_destroy(two);
}

static void forks_of_shared_ones(void)
{
    ndm_governor *governor = open_shared();
    CHECK(ndm_governor_reserve(governor, 0, 20 * MIB) == NDM_OK);
    CHECK(child_of(claim_of_its_own, governor) == 0); /* and ends without a word: its claim does, too */
    CHECK(ndm_governor_reserve(governor, 0, 12 * MIB) == NDM_OK);
    CHECK(ndm_governor_check(governor) == 0);
    ndm_governor_destroy(governor);
}

/* A child that dies inside the lock: in the middle of a sweep of its parent's slack, before or after its first half. */
static void die_in_a_sweep(ndm_governor *governor)
{
    CHECK(ndm_governor_reserve(governor, 0, MIB) == NDM_OK && ndm_i_books_lock(governor) == NDM_OK);
    ndm_i_books *books = governor->books;
    ndm_i_cell *cell = &governor->rows[0].cells[0];
    const uint64_t word = cell->slack;
    CHECK((word & NDM_I_SLACK_MASK) > 0);
    books->sweep.taken = word & NDM_I_SLACK_MASK;
    books->sweep.granted = cell->granted;
    books->sweep.count = word >> NDM_I_SLACK_BITS;
    books->sweep.row = 1;
    if (getenv("HALF"))
        cell->slack = word - books->sweep.taken + (NDM_I_SLACK_MASK + 1);
    books->granted += 7; /* and some total that was not finished */
    raise(SIGKILL);
}

static void a_death_in_the_lock_is_made_good(void)
{
    static ndm_governor_figures figures;
    for (int half = 0; half < 2; half++) {
        unlink(path);
        half ? setenv("HALF", "1", 1) : unsetenv("HALF");
        ndm_governor *governor = open_shared();
        CHECK(ndm_governor_reserve(governor, 0, 64 * KIB) == NDM_OK);
        CHECK(WTERMSIG(child_of(die_in_a_sweep, governor)) == SIGKILL);
        CHECK(ndm_governor_check(governor) == 0);
        CHECK(ndm_governor_snapshot(governor, &figures) == NDM_OK);
        CHECK(figures.repairs == 1 && figures.allocated == 64 * KIB && figures.process_count == 1);
        CHECK(ndm_governor_reserve(governor, 0, 32 * MIB - 64 * KIB) == NDM_OK);
        CHECK(ndm_governor_reserve(governor, 0, 1) == NDM_ERR_BUDGET && ndm_governor_check(governor) == 0);
        ndm_governor_destroy(governor);
    }
}

static void damage(uint64_t offset, uint64_t value)
{
    const int file = open(path, O_RDWR | O_CREAT, 0600);
    CHECK(file >= 0 && pwrite(file, &value, sizeof value, (off_t)offset) == sizeof value && close(file) == 0);
}

static void refuses(int os_errno)
{
    struct stat before, after;
    CHECK(stat(path, &before) == 0);
    CHECK(ndm_governor_open(path, &plain) == NULL);
    CHECK(ndm_last_error()->status == NDM_ERR_IO && ndm_last_error()->os_errno == os_errno);
    CHECK(ndm_governor_open(path, NULL) == NULL);
    CHECK(stat(path, &after) == 0 && before.st_size == after.st_size);
}

static void what_is_no_governor_is_refused(void)
{
    unlink(path);
    damage(0, 1); /* a short file of somebody's */
    refuses(EINVAL);
    unlink(path);
    ndm_governor_destroy(open_shared());
    damage(offsetof(ndm_i_books, layout), NDM_I_LAYOUT + 1);
    refuses(EINVAL);
    unlink(path);
    ndm_governor_destroy(open_shared());
    damage(0, 0x1234);
    refuses(EINVAL);
    unlink(path);
    ndm_governor_destroy(open_shared());
    damage(offsetof(ndm_i_books, engine[5].granted), 77);
    refuses(EUCLEAN);
    unlink(path);
    ndm_governor_destroy(open_shared());
    CHECK(truncate(path, sizeof(ndm_i_books)) == 0);
    refuses(EUCLEAN);
    unlink(path);
    CHECK(symlink("elsewhere", path) == 0);
    CHECK(ndm_governor_open(path, &plain) == NULL && ndm_last_error()->os_errno == ELOOP);
    unlink(path);
    CHECK(mkdir(path, 0700) == 0);
    CHECK(ndm_governor_open(path, &plain) == NULL && ndm_last_error()->status == NDM_ERR_IO);
    rmdir(path);
    /* Whoever was making the file was killed: its blocks are there, its head is not. */
    ndm_governor_destroy(open_shared());
    damage(0, 0);
    damage(offsetof(ndm_i_books, ceiling), 0);
    damage(offsetof(ndm_i_books, known), 0);
    ndm_governor_destroy(open_shared());
}

static void claims_have_an_end(void)
{
    static ndm_governor *many[NDM_I_ROWS];
    unlink(path);
    for (int i = 0; i < NDM_I_ROWS; i++)
        many[i] = open_shared();
    CHECK(ndm_governor_open(path, &plain) == NULL && ndm_last_error()->os_errno == EAGAIN);
    for (int i = 0; i < NDM_I_ROWS; i++)
        CHECK(ndm_governor_reserve(many[i], 0, 32 * MIB / NDM_I_ROWS) == NDM_OK);
    CHECK(ndm_governor_reserve(many[0], 0, 1) == NDM_ERR_BUDGET && ndm_governor_check(many[0]) == 0);
    for (int i = 0; i < NDM_I_ROWS; i++)
        ndm_governor_destroy(many[i]);
}

/* In a child: no file may be as long as a governor's. What was made of it is taken back. */
static void open_without_room(ndm_governor *none)
{
    const struct rlimit small = {1 << 20, RLIM_INFINITY};
    (void)none;
    signal(SIGXFSZ, SIG_IGN);
    CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0 && ndm_governor_open(path, &plain) == NULL);
    CHECK(ndm_last_error()->status == NDM_ERR_IO && ndm_last_error()->os_errno == EFBIG);
}

static void a_file_without_room_is_taken_back(void)
{
    struct stat facts;
    unlink(path);
    CHECK(child_of(open_without_room, NULL) == 0);
    CHECK(stat(path, &facts) == 0 && facts.st_size == 0);
    CHECK(ndm_governor_open(path, NULL) == NULL && ndm_last_error()->os_errno == EINVAL); /* nothing to look at */
    ndm_governor_destroy(open_shared());
}

static void who_looks_has_a_claim_when_it_needs_one(void)
{
    unlink(path);
    ndm_governor *governor = open_shared();
    for (int way = 0; way < 3; way++) {
        ndm_governor *looks = ndm_governor_open(path, NULL);
        CHECK(looks && ndm_governor_note_reclaimed(looks, 0, 5) == NDM_OK && ndm_governor_note_rejected(looks, 0) == NDM_OK);
        if (way == 0)
            CHECK(ndm_governor_charge(looks, 0, 5) == NDM_OK && ndm_governor_allocated(governor, 0) == 5);
        else if (way == 1)
            CHECK(ndm_governor_queue(looks, 0, 5) > 0);
        else
            CHECK(ndm_governor_note_real(looks, 5, 1) == NDM_OK);
        CHECK(ndm_governor_release(looks, 0, 6) == NDM_ERR_ARGUMENT && ndm_governor_check(governor) == 0);
        ndm_governor_destroy(looks);
        CHECK(ndm_governor_allocated(governor, -1) == 0 && ndm_governor_check(governor) == 0);
    }
    ndm_governor_destroy(governor);
}

static void nobody_is_an_error(void)
{
    static ndm_governor_figures figures;
    static uint64_t sizes[NDM_I_ENGINES];
    ndm_governor *governor = governor_of_three();
    CHECK(ndm_governor_reserve(NULL, 0, 1) == NDM_ERR_CLOSED && ndm_governor_charge(NULL, 0, 1) == NDM_ERR_CLOSED);
    CHECK(ndm_governor_release(NULL, 0, 1) == NDM_ERR_CLOSED && ndm_governor_snapshot(NULL, &figures) == NDM_ERR_CLOSED);
    CHECK(ndm_governor_queue(NULL, 0, 1) == NDM_ERR_CLOSED && ndm_governor_wait(NULL, 1, 0) == NDM_ERR_CLOSED);
    CHECK(ndm_governor_changes(NULL, -1, 0) == NDM_ERR_CLOSED && ndm_governor_note_real(NULL, 0, 0) == NDM_ERR_CLOSED);
    CHECK(ndm_governor_set_limit(NULL, 0, 1) == NDM_ERR_CLOSED && ndm_governor_set_ceiling(NULL, 1, 0) == NDM_ERR_CLOSED);
    CHECK(ndm_governor_allocated(NULL, 0) == NDM_ERR_CLOSED && ndm_governor_check(NULL) == NDM_ERR_CLOSED);
    CHECK(ndm_governor_ask(NULL, 0, 1) == NDM_ERR_CLOSED && ndm_governor_handle(NULL) == 0);
    CHECK(ndm_governor_asked(NULL, sizes) == 0 && !ndm_governor_is_asked(NULL));
    ndm_governor_leave(NULL, 1);
    ndm_governor_leave(governor, 77); /* nobody's */
    CHECK(ndm_governor_wait(governor, 77, 0) == NDM_ERR_ARGUMENT && ndm_governor_wait(governor, -1, 0) == NDM_ERR_ARGUMENT);
    CHECK(ndm_governor_add_engine(governor, 0, 5, 1) == NDM_ERR_ARGUMENT && ndm_governor_check(governor) == 0);
    ndm_governor_destroy(governor);
}

static void odd_options_are_refused(void)
{
    ndm_governor_options odd = plain;
    CHECK(ndm_governor_create(NULL) == NULL && ndm_last_error()->status == NDM_ERR_ARGUMENT);
    odd.ceiling = 0;
    CHECK(ndm_governor_create(&odd) == NULL);
    odd = plain;
    odd.headroom = odd.ceiling + 1;
    CHECK(ndm_governor_create(&odd) == NULL);
    odd = plain;
    odd.critical = 96;
    CHECK(ndm_governor_create(&odd) == NULL && ndm_governor_open(path, &odd) == NULL);
    ndm_governor_destroy(NULL);
}

int main(void)
{
    CHECK(mkdtemp(directory));
    snprintf(path, sizeof path, "%s/governor", directory);
    limits_hold();
    a_lowered_limit_takes_nothing_away();
    slack_of_other_engines_is_no_obstacle();
    headroom_is_left_by_the_spillable();
    a_charge_is_never_refused();
    pressure_rises_at_once_and_falls_late();
    waiters_are_served_in_order();
    a_release_wakes();
    the_line_has_an_end();
    a_number_ends_with_its_governor();
    a_child_has_reserved_nothing();
    one_ceiling_for_all();
    a_request_reaches_the_other();
    forks_of_shared_ones();
    a_death_in_the_lock_is_made_good();
    what_is_no_governor_is_refused();
    claims_have_an_end();
    a_file_without_room_is_taken_back();
    who_looks_has_a_claim_when_it_needs_one();
    nobody_is_an_error();
    odd_options_are_refused();
    unlink(path);
    rmdir(directory);
    return 0;
}
