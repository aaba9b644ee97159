/* Recovery that is refused half-way, with a lease that it would have kept: everything is given back, as LeakSanitizer
 * finds. Exits 1 at the first thing that is wrong. */
#define _GNU_SOURCE
#include "check.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

enum { SIZE = 8192, HEADER_ROOM = 4096, RECORD = 24 };

static char directory[] = "/tmp/nodedb-mem-test-XXXXXX";
static char path[100], slots_path[110], leases_path[110];

static void copy_place(const char *table, long from, long to)
{
    uint64_t place;
    FILE *file = fopen(table, "r+b");
    CHECK(file && fseek(file, HEADER_ROOM + from * RECORD, SEEK_SET) == 0 && fread(&place, sizeof place, 1, file) == 1);
    CHECK(fseek(file, HEADER_ROOM + to * RECORD, SEEK_SET) == 0 && fwrite(&place, sizeof place, 1, file) == 1);
    CHECK(fclose(file) == 0);
}

int main(void)
{
    CHECK(mkdtemp(directory));
    snprintf(path, sizeof path, "%s/region", directory);
    snprintf(slots_path, sizeof slots_path, "%s.slots", path);
    snprintf(leases_path, sizeof leases_path, "%s.leases", path);
    ndm_options options = {
        .initial_capacity = 1 << 20, .max_capacity = 1 << 24, .alignment = 64, .cache_limit = UINT64_MAX};
    ndm_region *region = ndm_region_open(path, &options);
    CHECK(region);
    char bytes[SIZE];
    for (int slot = 0; slot < 4; slot++)
        CHECK(ndm_region_write(region, memset(bytes, slot + 1, SIZE), SIZE, 0) == slot);
    CHECK(ndm_region_allow_leases(region) == NDM_OK);
    ndm_reader *reader = ndm_reader_open(path, slots_path, leases_path);
    CHECK(reader);
    ndm_value value;
    const char *view;
    const int64_t lease = ndm_reader_lease(reader, 1, -1, &view, &value);
    CHECK(lease >= 0 && ndm_region_free(region, 1) >= 0);
    ndm_region_destroy(region);

    copy_place(slots_path, 2, 3); /* two values overlap, behind the one that is leased */
    options.recover = 1;
    CHECK(!ndm_region_open(path, &options) && ndm_last_error()->os_errno == EUCLEAN);
    CHECK(view[0] == 2 && view[SIZE - 1] == 2);
    CHECK(ndm_reader_release(reader, lease) == NDM_OK);
    ndm_view_release(view);
    ndm_reader_destroy(reader);
    unlink(path);
    unlink(slots_path);
    unlink(leases_path);
    rmdir(directory);
    printf("torn: refused, nothing kept\n");
    return 0;
}
