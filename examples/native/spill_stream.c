/* Spill a stream of records from C, and tell a reader where they are.
 *
 *   spill_stream PATH COUNT < /dev/null | python read_stream.py PATH COUNT
 *
 * Each record gives a line on standard output with its slot, offset and size, and the CRC-32 of its bytes. The region
 * stays open until standard input ends, so that a reader can work beside it. */
#include <nodedb_mem.h>

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { RECORD_MAX = 5000, SENSOR_ENGINE = 3 };

static int fail(const char *what)
{
    const ndm_error *error = ndm_last_error();
    fprintf(stderr, "spill_stream: %s: %s", what, error->message);
    if (error->status == NDM_ERR_IO)
        fprintf(stderr, ": %s", strerror(error->os_errno));
    fputc('\n', stderr);
    return 1;
}

/* The stream: record `number` is so many bytes that look random. */
static uint64_t next_record(uint64_t number, uint8_t *record)
{
    uint64_t state = (number + 1) * 0x9E3779B97F4A7C15;
    const uint64_t size = number * 37 % RECORD_MAX;
    for (uint64_t i = 0; i < size; i++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        record[i] = (uint8_t)state;
    }
    return size;
}

static uint32_t crc32(const uint8_t *data, uint64_t size)
{
    uint32_t crc = UINT32_MAX;
    for (uint64_t i = 0; i < size; i++) {
        crc ^= data[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320 : 0);
    }
    return ~crc;
}

int main(int argc, char **argv)
{
    static uint8_t record[RECORD_MAX];
    const ndm_options options = {
        .initial_capacity = 1 << 16, .max_capacity = 1 << 30, .alignment = 64, .cache_limit = UINT64_MAX};
    if (argc != 3) {
        fprintf(stderr, "usage: spill_stream PATH COUNT\n");
        return 2;
    }
    if (NDM_CHECK_ABI() != NDM_OK)
        return fail("wrong library");
    ndm_region *region = ndm_region_open(argv[1], &options);
    if (!region)
        return fail(argv[1]);
    const uint64_t count = strtoull(argv[2], NULL, 10);
    for (uint64_t number = 0; number < count; number++) {
        const uint64_t size = next_record(number, record);
        const int64_t slot = ndm_region_write(region, record, size, SENSOR_ENGINE);
        ndm_slot where;
        if (slot < 0 || ndm_region_slot(region, slot, &where) < 0) {
            ndm_region_destroy(region);
            return fail("write");
        }
        printf("%" PRId64 " %" PRIu64 " %" PRIu64 " %" PRIu32 "\n", slot, where.offset, size, crc32(record, size));
        fflush(stdout);
    }
    while (getchar() != EOF)
        ;
    ndm_region_destroy(region);
    return 0;
}
