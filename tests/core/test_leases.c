/* Leases, and the claims below them: taken, released, noted; a full table; processes that are killed; two open files of one
 * process.
 *
 * usage: test_leases [directory] */
#define _GNU_SOURCE
#include "check.h"
#include "store/leases.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *directory = ".";
static char path[256];

enum { WHOLE = 32 + NDM_I_LEASES * 32 }; /* bytes of the file */

/* The owner, who makes the file, and a reader. */
static void start(ndm_i_leases *owner, ndm_i_leases *reader)
{
    CHECK(ndm_i_leases_start(owner, path) == NDM_OK);
    owner->incarnation = 42;
    CHECK(ndm_i_leases_join(reader, path, false) == NDM_OK);
    reader->incarnation = 42;
    CHECK(!ndm_i_leases_any(owner));
    CHECK(ndm_i_leases_look(path, NULL) == 0);
}

static void stop(ndm_i_leases *owner, ndm_i_leases *reader)
{
    ndm_i_leases_close(reader);
    CHECK(!ndm_i_leases_any(owner) && ndm_i_leases_look(path, NULL) == 0);
    ndm_i_leases_close(owner);
    CHECK(!ndm_i_leases_are_open(owner) && !ndm_i_leases_are_open(reader) && !owner->note);
    CHECK(unlink(path) == 0);
}

/* Run in a process of its own, which waits afterwards until it is killed. */
static pid_t start_process(void (*body)(void))
{
    int ready[2];
    char byte;
    CHECK(pipe(ready) == 0);
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* a test that fails leaves nobody behind */
        body();
        CHECK(write(ready[1], "x", 1) == 1);
        for (;;)
            pause();
    }
    close(ready[1]);
    CHECK(read(ready[0], &byte, 1) == 1);
    close(ready[0]);
    return child;
}

static void kill_process(pid_t child)
{
    int status;
    CHECK(kill(child, SIGKILL) == 0 && waitpid(child, &status, 0) == child && WIFSIGNALED(status));
}

/* ---- claims --------------------------------------------------------------------------------------------- */

static ndm_i_file claimed;

static void claim_some(void)
{
    ndm_i_file file;
    static ndm_i_claims claims;
    CHECK(ndm_i_file_open(&file, path, false, NDM_I_LOCK_NONE) == NDM_OK);
    ndm_i_claims_init(&claims, &file, NDM_I_MOST_CLAIMS);
    CHECK(!ndm_i_claims_take(&claims, 0)); /* the parent's */
    CHECK(ndm_i_claims_take(&claims, 5) && ndm_i_claims_take(&claims, NDM_I_MOST_CLAIMS - 1));
}

static void test_claims(void)
{
    static ndm_i_claims mine, theirs;
    ndm_i_file again;
    CHECK(ndm_i_file_open(&claimed, path, true, NDM_I_LOCK_NONE) == NDM_OK);
    CHECK(ndm_i_file_open(&again, path, false, NDM_I_LOCK_NONE) == NDM_OK);
    ndm_i_claims_init(&mine, &claimed, NDM_I_MOST_CLAIMS);
    ndm_i_claims_init(&theirs, &again, NDM_I_MOST_CLAIMS);
    for (uint64_t entry = 0; entry < NDM_I_MOST_CLAIMS; entry += 63) {
        CHECK(!ndm_i_claims_is_mine(&mine, entry) && !ndm_i_claims_is_held(&claimed, entry));
        CHECK(ndm_i_claims_take(&mine, entry) && ndm_i_claims_is_mine(&mine, entry));
        CHECK(!ndm_i_claims_take(&mine, entry));   /* already mine */
        CHECK(!ndm_i_claims_take(&theirs, entry)); /* two open files of one process exclude each other */
        CHECK(ndm_i_claims_is_held(&again, entry) && !ndm_i_claims_is_held(&claimed, entry));
        CHECK(ndm_i_claims_take(&theirs, entry + 1) && !ndm_i_claims_take(&mine, entry + 1));
        ndm_i_claims_drop(&theirs, entry + 1);
        CHECK(ndm_i_claims_take(&mine, entry + 1));
        ndm_i_claims_drop(&mine, entry + 1);
        CHECK(ndm_i_claims_is_mine(&mine, entry) && !ndm_i_claims_is_mine(&mine, entry + 1));
    }

    /* Asked for any, the kernel gives claims in a row, cut at the ends of the question. */
    uint64_t first = 64, end = 126;
    CHECK(!ndm_i_claims_find_held(&again, &first, &end) && first == 64 && end == 126);
    end = 127;
    CHECK(ndm_i_claims_find_held(&again, &first, &end) && first == 126 && end == 127);
    CHECK(ndm_i_claims_take(&mine, 127) && ndm_i_claims_take(&mine, 128));
    first = 127;
    end = 1000;
    CHECK(ndm_i_claims_find_held(&again, &first, &end) && (first != 127 || end == 129));
    first = 0;
    end = NDM_I_MOST_CLAIMS;
    CHECK(!ndm_i_claims_find_held(&claimed, &first, &end)); /* its own are none that it meets */

    /* Those of a process end with it; those of an open file with that. */
    const pid_t child = start_process(claim_some);
    CHECK(!ndm_i_claims_take(&mine, 5) && ndm_i_claims_is_held(&claimed, NDM_I_MOST_CLAIMS - 1));
    kill_process(child);
    CHECK(!ndm_i_claims_is_held(&claimed, NDM_I_MOST_CLAIMS - 1) && ndm_i_claims_take(&mine, 5));
    ndm_i_file_close(&claimed, NULL);
    first = 0;
    CHECK(!ndm_i_claims_find_held(&again, &first, &end) && ndm_i_claims_take(&theirs, 0));
    ndm_i_file_close(&again, path);
}

/* ---- leases --------------------------------------------------------------------------------------------- */

static int64_t held(ndm_i_leases *owner) { return ndm_i_leases_places(owner, NULL); }

static bool touch(ndm_i_leases *owner, ndm_i_span bytes)
{
    ndm_i_leases_look_round(owner);
    return ndm_i_leases_touched(owner, bytes);
}

static void test_one(void)
{
    static ndm_i_leases owner, reader;
    static ndm_i_span places[NDM_I_LEASES];
    start(&owner, &reader);
    const int64_t entry = ndm_i_leases_claim(&reader, 7, 3, (ndm_i_span){4096, 100});
    CHECK(entry >= 0 && ndm_i_leases_any(&owner));
    CHECK(ndm_i_leases_has(&owner, 7, 3) && !ndm_i_leases_has(&owner, 7, 4) && !ndm_i_leases_has(&owner, 6, 3));
    owner.incarnation = 43; /* a slot of another incarnation; but its bytes are leased all the same */
    CHECK(!ndm_i_leases_has(&owner, 7, 3) && touch(&owner, (ndm_i_span){4096, 1}));
    owner.incarnation = 42;
    CHECK(ndm_i_leases_places(&owner, places) == 1 && places[0].offset == 4096 && places[0].size == 100);
    places[0] = (ndm_i_span){0};
    CHECK(ndm_i_leases_look(path, places) == 1 && places[0].offset == 4096 && places[0].size == 100);

    /* The first slot and generation, and the last. */
    const int64_t first = ndm_i_leases_claim(&reader, 0, 0, (ndm_i_span){0, 0});
    const int64_t last = ndm_i_leases_claim(&reader, UINT32_MAX - 1, UINT32_MAX, (ndm_i_span){UINT64_MAX, 1});
    CHECK(first >= 0 && last >= 0 && first != last);
    CHECK(ndm_i_leases_has(&owner, 0, 0) && ndm_i_leases_has(&owner, UINT32_MAX - 1, UINT32_MAX));
    CHECK(!ndm_i_leases_has(&owner, 0, UINT32_MAX) && ndm_i_leases_places(&owner, places) == 3);

    ndm_i_leases_release(&reader, (uint64_t)entry);
    CHECK(!ndm_i_leases_has(&owner, 7, 3));
    ndm_i_leases_release(&reader, (uint64_t)entry); /* not held: nothing */
    CHECK(held(&owner) == 2);
    ndm_i_leases_release(&reader, (uint64_t)first);
    ndm_i_leases_release(&reader, (uint64_t)last);
    CHECK(!ndm_i_leases_any(&owner) && ndm_i_leases_places(&owner, places) == 0);
    stop(&owner, &reader);
}

static void test_touch(void)
{
    static ndm_i_leases owner, reader;
    start(&owner, &reader);
    CHECK(!touch(&owner, (ndm_i_span){0, UINT64_MAX}));
    CHECK(ndm_i_leases_claim(&reader, 1, 0, (ndm_i_span){500, 0}) >= 0); /* an empty value has no bytes */
    CHECK(!touch(&owner, (ndm_i_span){0, UINT64_MAX}));
    CHECK(ndm_i_leases_claim(&reader, 2, 0, (ndm_i_span){1000, 10}) >= 0);
    const struct {
        ndm_i_span bytes;
        bool touch;
    } cases[] = {{{0, 1000}, false},   {{0, 1001}, true},    {{1000, 1}, true},  {{1009, 1}, true},
                 {{1010, 5}, false},   {{990, 100}, true},   {{1003, 2}, true},  {{1000, 10}, true},
                 {{0, UINT64_MAX}, true}, {{1010, UINT64_MAX}, false}, {{999, 1}, false}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        CHECK(touch(&owner, cases[i].bytes) == cases[i].touch);
    /* What a reader says that cannot be: no sum of it overflows. */
    CHECK(ndm_i_leases_claim(&reader, 3, 0, (ndm_i_span){UINT64_MAX - 5, UINT64_MAX}) >= 0);
    CHECK(!touch(&owner, (ndm_i_span){0, 1000}));
    CHECK(touch(&owner, (ndm_i_span){UINT64_MAX - 1, 1}));
    stop(&owner, &reader);
}

static void test_full(void)
{
    static ndm_i_leases owner, reader, another;
    start(&owner, &reader);
    CHECK(ndm_i_leases_join(&another, path, false) == NDM_OK);
    for (uint32_t i = 0; i < NDM_I_LEASES; i++)
        CHECK(ndm_i_leases_claim(i % 2 ? &reader : &another, i, 0, (ndm_i_span){i * 64, 64}) == i);
    CHECK(held(&owner) == NDM_I_LEASES && ndm_i_leases_look(path, NULL) == NDM_I_LEASES);
    for (int i = 0; i < 2; i++) {
        CHECK(ndm_i_leases_claim(i ? &reader : &another, 9999, 0, (ndm_i_span){0, 1}) == NDM_ERR_IO);
        CHECK(ndm_last_error()->os_errno == EAGAIN && ndm_last_error()->file == NDM_FILE_LEASES);
    }
    CHECK(held(&owner) == NDM_I_LEASES && !ndm_i_leases_has(&owner, 9999, 0));
    ndm_i_leases_release(&reader, 0); /* another's: nothing */
    CHECK(held(&owner) == NDM_I_LEASES);
    ndm_i_leases_release(&reader, 1);
    CHECK(ndm_i_leases_claim(&another, 9999, 0, (ndm_i_span){0, 1}) == 1);
    ndm_i_leases_close(&another); /* its own are released, and no others */
    CHECK(held(&owner) == NDM_I_LEASES / 2 - 1);
    CHECK(ndm_i_leases_has(&owner, 3, 0) && !ndm_i_leases_has(&owner, 2, 0) && !ndm_i_leases_has(&owner, 9999, 0));
    stop(&owner, &reader);
}

/* ---- other processes ------------------------------------------------------------------------------------ */

static void lease_two(void)
{
    static ndm_i_leases reader;
    CHECK(ndm_i_leases_join(&reader, path, false) == NDM_OK);
    reader.incarnation = 42;
    CHECK(ndm_i_leases_claim(&reader, 1, 1, (ndm_i_span){64, 64}) >= 0);
    CHECK(ndm_i_leases_claim(&reader, 2, 1, (ndm_i_span){128, 64}) >= 0);
}

static void lease_all(void)
{
    static ndm_i_leases reader;
    CHECK(ndm_i_leases_join(&reader, path, false) == NDM_OK);
    while (ndm_i_leases_claim(&reader, 1, 1, (ndm_i_span){64, 64}) >= 0)
        ;
}

static void test_killed(void)
{
    static ndm_i_leases owner, reader;
    start(&owner, &reader);
    CHECK(ndm_i_leases_claim(&reader, 9, 1, (ndm_i_span){640, 64}) >= 0);
    pid_t child = start_process(lease_two);
    CHECK(held(&owner) == 3 && ndm_i_leases_has(&owner, 2, 1) && ndm_i_leases_look(path, NULL) == 3);
    kill_process(child);
    CHECK(held(&owner) == 1 && ndm_i_leases_look(path, NULL) == 1 && ndm_i_leases_has(&owner, 9, 1));
    CHECK(!ndm_i_leases_has(&owner, 1, 1) && !ndm_i_leases_has(&owner, 2, 1));

    /* Where the dead had all of the table, it is there for others. */
    child = start_process(lease_all);
    CHECK(held(&owner) == NDM_I_LEASES);
    kill_process(child);
    const int64_t entry = ndm_i_leases_claim(&reader, 4, 1, (ndm_i_span){0, 64});
    CHECK(entry >= 0 && held(&owner) == 2 && ndm_i_leases_has(&owner, 4, 1) && ndm_i_leases_has(&owner, 9, 1));
    stop(&owner, &reader);
}

/* What the owner has noted: what was leased then, and is still. Of what has come since it knows when it looks again. */
static void test_note(void)
{
    static ndm_i_leases owner, reader;
    start(&owner, &reader);
    ndm_i_leases_look_round(&owner);
    CHECK(owner.noted == NDM_I_NOTHING && !owner.note && !ndm_i_leases_noted(&owner, 1, 0));
    const int64_t first = ndm_i_leases_claim(&reader, 1, 0, (ndm_i_span){64, 64});
    CHECK(!ndm_i_leases_noted(&owner, 1, 0));
    ndm_i_leases_look_round(&owner);
    CHECK(owner.noted == NDM_I_SOMETHING && ndm_i_leases_noted(&owner, 1, 0) && !ndm_i_leases_noted(&owner, 4097, 0));
    CHECK(ndm_i_leases_claim(&reader, 2, 0, (ndm_i_span){128, 64}) >= 0 && !ndm_i_leases_noted(&owner, 2, 0));
    ndm_i_leases_release(&reader, (uint64_t)first);
    ndm_i_leases_look_round(&owner);
    CHECK(!ndm_i_leases_noted(&owner, 1, 0) && ndm_i_leases_noted(&owner, 2, 0));
    stop(&owner, &reader);

    /* Claims in many rows: what the kernel was not asked at once, it is asked where it matters. */
    start(&owner, &reader);
    for (uint32_t i = 0; i < NDM_I_LEASES; i++)
        CHECK(ndm_i_leases_claim(&reader, i, 7, (ndm_i_span){i * 64, 64}) == i);
    for (uint32_t i = 0; i < NDM_I_LEASES; i += 3)
        ndm_i_leases_release(&reader, i);
    ndm_i_leases_look_round(&owner);
    for (uint32_t i = 0; i < NDM_I_LEASES; i++) {
        CHECK(ndm_i_leases_noted(&owner, i, 7) == (i % 3 != 0) && !ndm_i_leases_noted(&owner, i, 8));
        CHECK(ndm_i_leases_touched(&owner, (ndm_i_span){i * 64, 1}) == (i % 3 != 0));
    }
    CHECK(held(&owner) == NDM_I_LEASES - (NDM_I_LEASES + 2) / 3 && ndm_i_leases_look(path, NULL) == held(&owner));

    /* A file that has lost its entries tells of none. One that cannot be read may tell of any. */
    CHECK(truncate(path, 0) == 0 && held(&owner) == 0 && !ndm_i_leases_has(&owner, 1, 7) && ndm_i_leases_any(&owner));
    const int fd = owner.file.fd;
    CHECK((owner.file.fd = open(path, O_WRONLY)) >= 0);
    ndm_i_leases_look_round(&owner);
    CHECK(owner.noted == NDM_I_ANYTHING && ndm_i_leases_noted(&owner, 1, 7) && touch(&owner, (ndm_i_span){0, 1}));
    CHECK(ndm_i_leases_places(&owner, NULL) == NDM_ERR_IO && ndm_last_error()->file == NDM_FILE_LEASES);
    close(owner.file.fd);
    owner.file.fd = fd;
    CHECK(ndm_i_leases_mend(&owner) == NDM_OK && ndm_i_leases_mend(&owner) == NDM_OK && held(&owner) == 0);
    stop(&owner, &reader);
}

static uint64_t key_at(int64_t entry)
{
    uint64_t key = 0;
    const int fd = open(path, O_RDONLY);
    CHECK(fd >= 0 && pread(fd, &key, sizeof key, 32 + entry * 32) == sizeof key && close(fd) == 0);
    return key;
}

/* The owner that comes next leaves all to its holders. */
static void test_next_owner(void)
{
    static ndm_i_leases owner, reader;
    start(&owner, &reader);
    const int64_t entry = ndm_i_leases_claim(&reader, 9, 1, (ndm_i_span){640, 64});
    CHECK(entry >= 0);
    for (int again = 0; again < 2; again++) {
        ndm_i_leases_close(&owner);
        CHECK((again ? ndm_i_leases_start(&owner, path) : ndm_i_leases_join(&owner, path, true)) == NDM_OK);
        owner.incarnation = 42;
        CHECK(ndm_i_leases_has(&owner, 9, 1) && touch(&owner, (ndm_i_span){0, 10000}));
    }
    /* It empties the entries that nobody claims, and those only. */
    const int64_t other = ndm_i_leases_claim(&reader, 10, 1, (ndm_i_span){0, 64});
    CHECK(other == entry + 1);
    ndm_i_leases_release(&reader, (uint64_t)other);
    CHECK(key_at(entry) == (10 | (uint64_t)1 << 32) && key_at(other) == (11 | (uint64_t)1 << 32));
    ndm_i_leases_reap(&owner);
    CHECK(key_at(entry) == (10 | (uint64_t)1 << 32) && key_at(other) == 0 && ndm_i_leases_has(&owner, 9, 1));
    ndm_i_leases_release(&reader, (uint64_t)entry);
    CHECK(!ndm_i_leases_has(&owner, 9, 1) && held(&owner) == 0);
    stop(&owner, &reader);
}

static void write_file(const void *bytes, size_t size, off_t length)
{
    FILE *file = fopen(path, "w");
    CHECK(file && fwrite(bytes, 1, size, file) == size && fclose(file) == 0 && truncate(path, length) == 0);
}

/* What is no leases file is refused, and stays as it is; of another version, a new file takes its place. */
static void test_foreign(void)
{
    static ndm_i_leases leases;
    struct stat facts;
    CHECK(ndm_i_leases_look(path, NULL) == 0);
    CHECK(ndm_i_leases_join(&leases, path, false) == NDM_ERR_IO && ndm_last_error()->os_errno == ENOENT);
    write_file("somebody's own words", 20, 20);
    CHECK(ndm_i_leases_start(&leases, path) == NDM_ERR_IO && ndm_last_error()->os_errno == EEXIST);
    CHECK(ndm_i_leases_join(&leases, path, true) == NDM_ERR_IO && ndm_last_error()->os_errno == EINVAL);
    CHECK(ndm_i_leases_look(path, NULL) == NDM_ERR_IO);
    CHECK(stat(path, &facts) == 0 && facts.st_size == 20);
    write_file("short", 5, 5);
    CHECK(ndm_i_leases_start(&leases, path) == NDM_ERR_IO && ndm_last_error()->os_errno == EEXIST);

    write_file("NDMLEASE\7\0\0\0\0\0\0\0", 16, WHOLE);
    CHECK(ndm_i_leases_join(&leases, path, false) == NDM_ERR_IO && ndm_last_error()->os_errno == EINVAL);
    CHECK(ndm_i_leases_start(&leases, path) == NDM_OK && ndm_i_file_size(&leases.file) == WHOLE);
    ndm_i_leases_close(&leases);
    write_file("", 0, WHOLE); /* one whose maker died at once */
    CHECK(ndm_i_leases_look(path, NULL) == 0);
    CHECK(ndm_i_leases_start(&leases, path) == NDM_OK && held(&leases) == 0);
    ndm_i_leases_close(&leases);
    CHECK(unlink(path) == 0);

    CHECK(ndm_i_leases_start(&leases, NULL) == NDM_OK && !ndm_i_leases_any(&leases)); /* in memory */
    ndm_i_leases_close(&leases);
    CHECK(!ndm_i_leases_any(&leases) && held(&leases) == 0); /* none at all is none held */
    ndm_i_leases_look_round(&leases);
    CHECK(!ndm_i_leases_noted(&leases, 0, 0));
}

int main(int argc, char **argv)
{
    if (argc > 1)
        directory = argv[1];
    else if (getenv("TMPDIR"))
        directory = getenv("TMPDIR");
    snprintf(path, sizeof path, "%s/test-leases-%d", directory, getpid());
    test_claims();
    test_one();
    test_touch();
    test_full();
    test_killed();
    test_note();
    test_next_owner();
    test_foreign();
    puts("leases: claims, one, touch, full, killed, note, next owner, foreign: ok");
    return 0;
}
