/* Which data file a slot table speaks of: the file's identity, its place, and the time of its last change.
 *
 * usage: test_kinship [directory] */
#define _GNU_SOURCE
#include "check.h"
#include "store/kinship.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#define SECOND ((uint64_t)1000000000)

static const char attribute[] = "user.nodedb_mem.identity";
static char path[256];

static void take(ndm_i_file *file)
{
    CHECK(ndm_i_file_open(file, path, true, NDM_I_LOCK_FILE) == NDM_OK);
}

static void end(ndm_i_file *file) { ndm_i_file_close(file, path); }

static bool keeps_attributes(void)
{
    ndm_i_file file;
    take(&file);
    const bool keeps = ndm_i_identity_set(&file, ndm_i_identity_fresh());
    end(&file);
    return keeps;
}

/* Another file, as a copy of this one would be found. */
static ndm_i_file copied(const ndm_i_file *file)
{
    ndm_i_file copy = *file;
    copy.inode++;
    copy.born += copy.born != 0;
    return copy;
}

static ndm_i_header begun(const ndm_i_file *file)
{
    ndm_i_header header = {.version = 3};
    atomic_init(&header.inode, file->inode);
    atomic_init(&header.born, file->born);
    ndm_i_kinship_begin(&header, file, NULL);
    return header;
}

static void test_identity(void)
{
    ndm_i_file file;
    take(&file);
    CHECK(!ndm_i_identity_is_set(ndm_i_identity_of(&file)));
    const ndm_i_identity one = ndm_i_identity_fresh(), other = ndm_i_identity_fresh();
    CHECK(ndm_i_identity_is_set(one) && !ndm_i_identity_equal(one, other));
    CHECK(ndm_i_identity_set(&file, one) && ndm_i_identity_equal(ndm_i_identity_of(&file), one));
    CHECK(fsetxattr(file.fd, attribute, "longer than an identity", 23, 0) == 0);
    CHECK(!ndm_i_identity_is_set(ndm_i_identity_of(&file)));
    CHECK(fsetxattr(file.fd, attribute, "short", 5, 0) == 0 && !ndm_i_identity_is_set(ndm_i_identity_of(&file)));
    end(&file);
}

static void test_the_very_file(void)
{
    ndm_i_file file;
    take(&file);
    ndm_i_header header = begun(&file);
    CHECK(ndm_i_kinship_of(&header, &file) == NDM_I_SAME);
    ndm_i_file moved = file; /* an overlay may give it another number */
    moved.inode++;
    CHECK(file.born == 0 || ndm_i_kinship_of(&header, &moved) == NDM_I_SAME);
    CHECK(fremovexattr(file.fd, attribute) == 0 && ndm_i_kinship_of(&header, &file) == NDM_I_SAME);
    ndm_i_kinship_renew(&header, &file); /* and it bears its identity again */
    CHECK(ndm_i_word(&header.identity[0]) == ndm_i_identity_of(&file).words[0]);
    end(&file);
}

static void test_copies(void)
{
    ndm_i_file file;
    take(&file);
    ndm_i_header header = begun(&file);
    ndm_i_file copy = copied(&file);
    CHECK(ndm_i_kinship_of(&header, &copy) == NDM_I_LIVE_COPY);
    ndm_i_kinship_seal(&header, &file);
    const uint64_t closed = ndm_i_word(&header.closed_at);
    struct stat facts;
    CHECK(fstat(file.fd, &facts) == 0 && closed != 0);
    CHECK((uint64_t)facts.st_mtim.tv_sec * SECOND + (uint64_t)facts.st_mtim.tv_nsec == closed);
    const uint64_t steps[] = {1, 100, 1000, 1000000, SECOND, 2 * SECOND};
    for (unsigned i = 0; i < sizeof steps / sizeof *steps; i++) {
        copy.modified = closed - closed % steps[i];
        CHECK(ndm_i_kinship_of(&header, &copy) == NDM_I_COPY);
        copy.modified += 3 * SECOND;
        CHECK(ndm_i_kinship_of(&header, &copy) == NDM_I_LIVE_COPY);
    }
    copy.modified = 0;
    CHECK(ndm_i_kinship_of(&header, &copy) == NDM_I_LIVE_COPY);
    atomic_store(&header.closed_at, 0);
    CHECK(ndm_i_kinship_of(&header, &copy) == NDM_I_LIVE_COPY && ndm_i_kinship_check(NDM_I_LIVE_COPY) == NDM_ERR_IO);

    /* A copy that is taken over is a region of its own. */
    ndm_i_header first = header;
    copy.modified = closed;
    atomic_store(&header.closed_at, closed);
    ndm_i_kinship_renew(&header, &copy);
    CHECK(ndm_i_kinship_of(&header, &copy) == NDM_I_SAME && ndm_i_word(&header.closed_at) == 0);
    CHECK(ndm_i_kinship_of(&first, &copy) == NDM_I_STRANGERS);
    end(&file);
}

static void test_lost_and_strange(void)
{
    ndm_i_file file;
    take(&file);
    ndm_i_header header = begun(&file), none = header;
    const ndm_i_file copy = copied(&file);
    CHECK(ndm_i_identity_set(&file, ndm_i_identity_fresh()));
    CHECK(ndm_i_kinship_of(&header, &copy) == NDM_I_STRANGERS && ndm_i_kinship_of(&header, &file) == NDM_I_STRANGERS);
    CHECK(ndm_i_kinship_check(NDM_I_STRANGERS) == NDM_ERR_IO && ndm_last_error()->os_errno == EINVAL);
    atomic_store(&none.identity[0], 0), atomic_store(&none.identity[1], 0); /* of a file system without attributes */
    CHECK(ndm_i_kinship_of(&none, &file) == NDM_I_SAME && ndm_i_kinship_of(&none, &copy) == NDM_I_STRANGERS);
    CHECK(fremovexattr(file.fd, attribute) == 0);
    CHECK(ndm_i_kinship_of(&header, &copy) == NDM_I_LOST && ndm_i_kinship_of(&none, &copy) == NDM_I_LOST);
    CHECK(ndm_i_kinship_check(NDM_I_LOST) == NDM_ERR_IO && ndm_last_error()->os_errno == EUCLEAN);
    end(&file);
}

/* The process may die between the two notes and the file: the file bears one of both. */
static void test_half_renewed(void)
{
    ndm_i_file file;
    take(&file);
    ndm_i_header header = begun(&file);
    const ndm_i_identity before = ndm_i_identity_of(&file), after = ndm_i_identity_fresh();
    for (int i = 0; i < 2; i++) {
        atomic_store(&header.identity_before[i], before.words[i]);
        atomic_store(&header.identity[i], after.words[i]);
    }
    CHECK(ndm_i_kinship_of(&header, &file) == NDM_I_SAME);
    CHECK(ndm_i_identity_set(&file, after) && ndm_i_kinship_of(&header, &file) == NDM_I_SAME);
    CHECK(ndm_i_identity_set(&file, before));
    ndm_i_kinship_renew(&header, &file);
    CHECK(ndm_i_kinship_of(&header, &file) == NDM_I_SAME && ndm_i_word(&header.identity_before[0]) == 0);
    CHECK(ndm_i_word(&header.identity[0]) == ndm_i_identity_of(&file).words[0]);
    end(&file);
}

int main(int argc, char **argv)
{
    const char *folder = argc > 1 ? argv[1] : getenv("TMPDIR");
    snprintf(path, sizeof path, "%s/test-kinship-%d", folder ? folder : ".", getpid());
    if (!keeps_attributes()) {
        puts("kinship: not tested, there are no extended attributes here");
        return 0;
    }
    test_identity();
    test_the_very_file();
    test_copies();
    test_lost_and_strange();
    test_half_renewed();
    puts("kinship: identity, the very file, copies, lost and strange, half renewed: ok");
    return 0;
}
