/* A disk that cannot read the leases file back, at any moment of a default open: values are lost with the open's success, or
 * not at all, and what readers lease stays as it is. Exits 1 at the first thing that is wrong. */
#define _GNU_SOURCE
#include "check.h"

#include "region/ledger.h"

#include <errno.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SIZE = 100000 };

static char directory[] = "/tmp/nodedb-mem-test-XXXXXX";
static char path[100], slots_path[110], leases_path[110];
static int reads_left = -1; /* of the leases file; negative: all work */

/* Stands before the C library's. */
ssize_t pread(int fd, void *buffer, size_t size, off_t offset)
{
    char link[40], name[200] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (readlink(link, name, sizeof name - 1) > 0 && strcmp(name, leases_path) == 0 && reads_left >= 0 && reads_left-- == 0) {
        reads_left = 0;
        errno = EIO;
        return -1;
    }
    return syscall(SYS_pread64, fd, buffer, size, offset);
}

static ndm_region *opened(int recover)
{
    const ndm_options options = {.initial_capacity = 1 << 20,
                                 .max_capacity = 1 << 24,
                                 .alignment = 64,
                                 .cache_limit = UINT64_MAX,
                                 .recover = recover};
    return ndm_region_open(path, &options);
}

static bool is_whole(const char *view)
{
    for (int i = 0; i < SIZE; i++)
        if (view[i] != 7)
            return false;
    return true;
}

/* Open the region afresh while that many reads of its leases work. Has it opened? */
static bool try_to_open(int reads)
{
    static char value[SIZE];
    ndm_value found;
    const char *view = NULL;
    ndm_region *region = opened(0);
    CHECK(region && ndm_region_write(region, memset(value, 7, SIZE), SIZE, 0) == 0);
    CHECK(ndm_region_allow_leases(region) == NDM_OK);
    ndm_reader *reader = ndm_reader_open(path, slots_path, leases_path);
    const int64_t lease = reader ? ndm_reader_lease(reader, 0, -1, &view, &found) : -1;
    CHECK(lease >= 0 && is_whole(view));
    ndm_region_destroy(region);

    reads_left = reads;
    region = opened(0);
    const bool opens = region != NULL;
    if (!opens) {
        CHECK(ndm_last_error()->status == NDM_ERR_IO && ndm_last_error()->os_errno == EIO);
        CHECK(ndm_last_error()->file == NDM_FILE_LEASES);
        reads_left = -1;
        CHECK((region = opened(1)) && ndm_region_contains(region, 0) == 1 && ndm_region_free(region, 0) == NDM_OK);
    }
    CHECK(ndm_region_write(region, memset(value, 9, SIZE), SIZE, 0) == 0 && ndm_region_check(region) == 0);
    CHECK(is_whole(view));
    reads_left = -1;
    CHECK(ndm_reader_release(reader, lease) == NDM_OK);
    ndm_view_release(view);
    ndm_reader_destroy(reader);
    ndm_i_settle(region);
    CHECK(region->limbo.units == 0 && region->limbo.waiting_units == 0 && ndm_region_check(region) == 0);
    ndm_region_destroy(region);
    CHECK(unlink(path) == 0 && unlink(slots_path) == 0 && unlink(leases_path) == 0);
    return opens;
}

int main(void)
{
    CHECK(mkdtemp(directory));
    snprintf(path, sizeof path, "%s/region", directory);
    snprintf(slots_path, sizeof slots_path, "%s.slots", path);
    snprintf(leases_path, sizeof leases_path, "%s.leases", path);
    int refused = 0, opens = 0, reads = 1; /* the mark could be read */
    for (; opens < 30; reads++) {
        if (try_to_open(reads))
            opens++;
        else
            refused++;
        CHECK(reads < 100);
    }
    CHECK(refused > 0);
    rmdir(directory);
    printf("unreadable: %d opens refused, %d good\n", refused, opens);
    return 0;
}
