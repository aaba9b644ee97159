/* A fork on another thread, in the midst of a verb: before and after each system call by which the verb opens, closes, maps
 * or unmaps, in turn. Whatever the moment, the child has no descriptor of a region's files, no mapping of them that no view
 * uses, and all descriptors that are not the library's. The linker leads the core's system calls here (build.mk). */
#define _GNU_SOURCE
#include "check.h"
#include "emulated.h"
#include "os/fork.h"
#include "store/leases.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

enum { MOST_FDS = 256, PATIENCE_NS = 20000000 };

static char folder[] = "/var/tmp/test-forks-XXXXXX";
static char path[64];

/* ---- the child ------------------------------------------------------------------------------------------ */

static int stranger = -1; /* a descriptor that took the number of one that was just closed */
static bool views_live;   /* and keep their mapping */

static bool is_ours(const char *name) { return strstr(name, folder) || strstr(name, "memfd:nodedb_mem"); }

static bool has_descriptor(void)
{
    for (int fd = 0; fd < MOST_FDS; fd++) {
        char name[32], link[256];
        snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
        const ssize_t length = readlink(name, link, sizeof link - 1);
        link[length > 0 ? length : 0] = 0;
        if (is_ours(link)) {
            dprintf(2, "the child has descriptor %d: %s\n", fd, link);
            return true;
        }
    }
    return false;
}

static bool has_mapping(void)
{
    static char maps[1 << 20];
    size_t length = 0;
    const int fd = open("/proc/self/maps", O_RDONLY);
    for (ssize_t done; (done = read(fd, maps + length, sizeof maps - 1 - length)) > 0;)
        length += (size_t)done;
    close(fd);
    if (is_ours(maps))
        dprintf(2, "the child has a mapping:%.200s\n", strstr(maps, folder) ? strstr(maps, folder) - 60 : "");
    return is_ours(maps);
}

static bool is_sound(void)
{
    struct stat facts;
    if (fstat(0, &facts) != 0 || (stranger >= 0 && fstat(stranger, &facts) != 0)) {
        dprintf(2, "the child has closed a stranger's descriptor\n");
        return false;
    }
    return !has_descriptor() && (views_live || !has_mapping());
}

/* ---- forking at a moment -------------------------------------------------------------------------------- */

static sem_t wanted, forked;
static _Atomic bool ending;
static _Atomic int unsound; /* children */
static pthread_t worker;    /* the thread whose calls count */
static long moment, chosen; /* of the worker's calls */
static bool counting;

static void *fork_when_wanted(void *unused)
{
    for (;;) {
        sem_wait(&wanted);
        if (atomic_load(&ending))
            return unused;
        const pid_t child = fork();
        if (child == 0) {
            alarm(20);
            _exit(is_sound() ? 0 : 1);
        }
        sem_post(&forked);
        int result = 0;
        if (child < 0 || waitpid(child, &result, 0) != child || result != 0)
            atomic_fetch_add(&unsound, 1);
        sem_post(&forked);
    }
}

/* Have the other thread fork, and wait until it has; not for long, since this thread may bar it. */
static void fork_now(void)
{
    struct timespec until;
    const int saved = errno;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += PATIENCE_NS;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    sem_post(&wanted);
    if (sem_timedwait(&forked, &until) == 0)
        sem_post(&forked);
    errno = saved;
}

static void await_child(void)
{
    sem_wait(&forked);
    sem_wait(&forked);
}

static bool is_chosen(void)
{
    return counting && pthread_equal(pthread_self(), worker) && moment++ == chosen;
}

static void pass(void)
{
    if (is_chosen())
        fork_now();
}

int __real_open(const char *name, int flags, ...);
int __real_memfd_create(const char *name, unsigned flags);
int __real_close(int fd);
void *__real_mmap(void *place, size_t length, int rights, int flags, int fd, off_t offset);
int __real_munmap(void *place, size_t length);
void *__real_mremap(void *old, size_t length, size_t wanted_length, int flags, ...);
int __real_madvise(void *place, size_t length, int advice);
int __wrap_open(const char *name, int flags, ...);
int __wrap_memfd_create(const char *name, unsigned flags);
int __wrap_close(int fd);
void *__wrap_mmap(void *place, size_t length, int rights, int flags, int fd, off_t offset);
int __wrap_munmap(void *place, size_t length);
void *__wrap_mremap(void *old, size_t length, size_t wanted_length, int flags, ...);
int __wrap_madvise(void *place, size_t length, int advice);

int __wrap_open(const char *name, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    const int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0;
    va_end(rest);
    pass();
    const int fd = __real_open(name, flags, mode);
    pass();
    return fd;
}

int __wrap_memfd_create(const char *name, unsigned flags)
{
    const int fd = __real_memfd_create(name, flags);
    pass();
    return fd;
}

int __wrap_close(int fd)
{
    pass();
    const int result = __real_close(fd);
    if (is_chosen()) {
        stranger = dup2(0, fd);
        fork_now();
    }
    return result;
}

void *__wrap_mmap(void *place, size_t length, int rights, int flags, int fd, off_t offset)
{
    void *base = __real_mmap(place, length, rights, flags, fd, offset);
    pass();
    return base;
}

int __wrap_munmap(void *place, size_t length)
{
    pass();
    const int result = __real_munmap(place, length);
    pass();
    return result;
}

void *__wrap_mremap(void *old, size_t length, size_t wanted_length, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    void *place = va_arg(rest, void *);
    va_end(rest);
    pass();
    void *base = __real_mremap(old, length, wanted_length, flags, place);
    pass();
    return base;
}

int __wrap_madvise(void *place, size_t length, int advice)
{
    pass();
    const int result = __real_madvise(place, length, advice);
    pass();
    return result;
}

/* Run a part of the library's life as often as it has moments, with a fork at another one each time. */
static void at_each_moment(const char *name, void (*life)(void))
{
    long forks = 0;
    chosen = 0;
    worker = pthread_self();
    do {
        moment = 0;
        life();
        counting = false;
        if (moment > chosen) {
            forks++;
            await_child();
        }
        if (stranger >= 0)
            __real_close(stranger);
        stranger = -1;
        if (atomic_load(&unsound) > 0)
            fprintf(stderr, "%s: at moment %ld\n", name, chosen);
        CHECK(atomic_load(&unsound) == 0);
    } while (moment > chosen++);
    CHECK(forks > 0);
    printf("%s: forked at each of %ld moments\n", name, forks);
}

/* ---- the lives ------------------------------------------------------------------------------------------ */

static ndm_options options = {
    .initial_capacity = 1 << 20, .max_capacity = 1 << 22, .alignment = 64, .cache_limit = 8 << 20};
static char value[256 << 10];

static void remove_files(void)
{
    static const char *const endings[] = {"", ".slots", ".leases"};
    for (int i = 0; i < 3; i++) {
        char name[80];
        snprintf(name, sizeof name, "%s%s", path, endings[i]);
        unlink(name);
    }
}

static void named_life(void)
{
    remove_files();
    counting = true;
    ndm_region *region = ndm_region_open(path, &options);
    CHECK(region && ndm_region_write(region, value, 100, 0) == 0 && ndm_region_allow_leases(region) == NDM_OK);
    ndm_region_destroy(region);
    CHECK((region = ndm_region_open(path, &options)) && ndm_region_close(region) == NDM_OK);
    ndm_region_destroy(region);
}

static void temporary_life(void)
{
    counting = true;
    ndm_region *region = ndm_region_open_temporary(folder, &options);
    CHECK(region && ndm_region_write(region, value, sizeof value, 0) == 0);
    ndm_region_destroy(region);
}

static void refused_life(void)
{
    counting = true;
    ndm_region *region = ndm_region_open(path, &options);
    CHECK(region && !ndm_region_open(path, &options) && ndm_last_error()->status == NDM_ERR_BUSY);
    CHECK(!ndm_reader_open(path, path, path));
    ndm_region_destroy(region);
}

/* A private view, and a large one, whose pages leave with it. */
static void viewed_life(void)
{
    uint64_t size;
    ndm_region *region = ndm_region_open_temporary(folder, &options);
    CHECK(region && ndm_region_write(region, value, sizeof value, 0) == 0);
    views_live = counting = true;
    char *restored = ndm_region_restore(region, 0, &size);
    CHECK(restored);
    ndm_view_release(restored);
    views_live = false;
    const char *view = ndm_region_read(region, 0, &size);
    CHECK(view);
    views_live = true;
    ndm_region_destroy(region);
    ndm_view_release(view); /* the last of the region */
    views_live = false;
}

static void growing_life(bool viewed)
{
    uint64_t size;
    ndm_region *region = ndm_region_open_temporary(folder, &options);
    CHECK(region && ndm_region_write(region, value, sizeof value, 0) == 0);
    const char *view = viewed ? ndm_region_read(region, 0, &size) : NULL;
    CHECK(ndm_region_set_max_capacity(region, 64 << 20) == NDM_OK);
    views_live = viewed;
    counting = true;
    for (int i = 0; i < 20; i++)
        CHECK(ndm_region_write(region, value, sizeof value, 0) >= 0);
    counting = false;
    ndm_view_release(view);
    ndm_region_destroy(region);
    views_live = false;
}

static void moved_life(void) { growing_life(false); }
static void doubled_life(void) { growing_life(true); }

static void readers_life(void)
{
    char slots[80], leases[80], copy[100];
    ndm_value found;
    ndm_reader_figures figures;
    const char *view = NULL;
    snprintf(slots, sizeof slots, "%s.slots", path);
    snprintf(leases, sizeof leases, "%s.leases", path);
    ndm_region *region = ndm_region_open(path, &options);
    CHECK(region && ndm_region_write(region, value, 100, 0) == 0 && ndm_region_allow_leases(region) == NDM_OK);
    counting = true;
    ndm_reader *reader = ndm_reader_open(path, slots, leases);
    CHECK(reader && ndm_reader_copy(reader, 0, -1, copy, sizeof copy) == sizeof copy);
    CHECK(ndm_reader_stats(reader, &figures) == NDM_OK && ndm_reader_leases(reader, NULL, 0) == 0);
    views_live = true;
    const int64_t lease = ndm_reader_lease(reader, 0, -1, &view, &found);
    CHECK(lease >= 0 && ndm_reader_release(reader, lease) == NDM_OK);
    ndm_view_release(view);
    views_live = false;
    ndm_reader_destroy(reader);
    ndm_region_destroy(region);
}

/* ---- owners that do nothing ----------------------------------------------------------------------------- */

static void *open_and_end(void *unused)
{
    (void)unused;
    ndm_region *region = ndm_region_open_temporary(folder, &options);
    CHECK(region && ndm_region_write(region, value, sizeof value, 0) == 0);
    return region;
}

static void test_idle_owners(void)
{
    pthread_t thread;
    void *ended;
    CHECK(pthread_create(&thread, NULL, open_and_end, NULL) == 0 && pthread_join(thread, &ended) == 0);
    ndm_region *idle = open_and_end(NULL);
    fork_now();
    await_child();
    CHECK(atomic_load(&unsound) == 0);
    ndm_region_destroy(idle);
    ndm_region_destroy(ended);
    printf("a child of another thread lets go of what idle and ended owners have\n");
}

/* ---- a moment without a system call --------------------------------------------------------------------- */

#if defined(__x86_64__)
static ndm_i_leases watched;
static volatile sig_atomic_t steps, seen;

static void let_go_of_watched(void *unused)
{
    (void)unused;
    ndm_i_file_abandon(&watched.file);
}

/* After each instruction. */
static void look(int number, siginfo_t *information, void *context)
{
    (void)number, (void)information, (void)context;
    steps++;
    if (!seen && *(volatile int *)&watched.file.fd == 0) {
        seen = 1;
        fork_now();
    }
}

static void set_steps(bool on)
{
    if (on)
        __asm__ volatile("pushfq; orq $0x100, (%%rsp); popfq" ::: "memory", "cc");
    else
        __asm__ volatile("pushfq; andq $~0x100, (%%rsp); popfq" ::: "memory", "cc");
}

/* A struct that is set to zeros, and then to -1, names descriptor 0 in between. */
static void test_each_instruction(void)
{
    char leases[80];
    ndm_i_fork_entry entry = {.in_child = let_go_of_watched};
    struct sigaction action = {.sa_sigaction = look, .sa_flags = SA_SIGINFO}, before;
    snprintf(leases, sizeof leases, "%s.leases", path);
    watched.file.fd = -1;
    chosen = -1;
    ndm_i_fork_add(&entry);
    CHECK(sigaction(SIGTRAP, &action, &before) == 0);
    set_steps(true);
    const int status = ndm_i_leases_join(&watched, leases, false);
    set_steps(false);
    CHECK(sigaction(SIGTRAP, &before, NULL) == 0 && status == NDM_OK);
    if (seen)
        await_child();
    CHECK(atomic_load(&unsound) == 0);
    ndm_i_leases_close(&watched);
    ndm_i_fork_remove(&entry);
    if (steps > 0)
        printf("after each of %d instructions of an open the child keeps descriptor 0\n", (int)steps);
    else
        printf("skipped: no single steps here\n");
}
#else
static void test_each_instruction(void) { printf("skipped: single steps are for x86-64\n"); }
#endif

int main(void)
{
    pthread_t forker;
    CHECK(mkdtemp(folder) && sem_init(&wanted, 0, 0) == 0 && sem_init(&forked, 0, 0) == 0);
    snprintf(path, sizeof path, "%s/r", folder);
    while (fcntl(0, F_GETFD) < 0)
        CHECK(open("/dev/null", O_RDONLY) >= 0);
    CHECK(pthread_create(&forker, NULL, fork_when_wanted, NULL) == 0);
    chosen = -1;
    test_idle_owners();
    at_each_moment("a named region", named_life);
    at_each_moment("a temporary region", temporary_life);
    at_each_moment("refused opens", refused_life);
    at_each_moment("views", viewed_life);
    at_each_moment("a mapping that moves", moved_life);
    if (can_double_mappings())
        at_each_moment("a mapping that is doubled", doubled_life);
    at_each_moment("a reader", readers_life);
    test_each_instruction();
    atomic_store(&ending, true);
    sem_post(&wanted);
    pthread_join(forker, NULL);
    remove_files();
    rmdir(folder);
    return 0;
}
