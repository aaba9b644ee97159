#include "slots.h"

#include "status.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The header fills the table's first page, so that records start aligned and out of its way. */
struct header {
    char magic[8];
    uint32_t version;
    uint32_t byte_order;
    uint32_t page_size;
    uint32_t record_size;
    uint64_t inode; /* of the data file, with its time of birth: inode numbers are reused */
    uint64_t born;
};

#define HEADER_ROOM ((uint64_t)4096)
#define FIRST_ROOM ((uint64_t)64 << 10)
#define MOST_SLOTS ((uint64_t)NDM_I_NO_SLOT)

static const char magic[8] = {'N', 'D', 'M', 'S', 'L', 'O', 'T', 'S'};
static const char foreign_data[] = "the file holds data that no overflow region wrote";
static const char not_a_table[] = "a file stands where the slot table belongs, and it is none";
enum { VERSION = 1, BYTE_ORDER_MARK = 0x01020304 };

_Static_assert(sizeof(struct header) <= HEADER_ROOM, "the header fits its page");
_Static_assert(sizeof(ndm_i_record) == 24, "24 bytes a slot");

static struct header *header_of(const ndm_i_slots *slots) { return (struct header *)slots->table.mapping->base; }

static ndm_i_record *records_of(const ndm_i_slots *slots)
{
    return (ndm_i_record *)(slots->table.mapping->base + HEADER_ROOM);
}

static uint64_t room(const ndm_i_slots *slots)
{
    const uint64_t records = (slots->table.capacity - HEADER_ROOM) / sizeof(ndm_i_record);
    return records < MOST_SLOTS ? records : MOST_SLOTS;
}

/* 1: the table there is ours and speaks of this data file. 0: ours, but of another, or empty. Negative: not ours. */
static int recognise(const ndm_i_slots *slots, const ndm_i_backing *data)
{
    static const struct header unwritten;
    struct header found;
    if (slots->table.capacity == 0)
        return 0;
    if (slots->table.capacity < sizeof found ||
        ndm_i_backing_load(&slots->table, 0, &found, sizeof found) != NDM_OK)
        return ndm_i_fail_io(EEXIST, not_a_table);
    /* An open that failed, or was killed, between sizing the table and marking it. */
    if (slots->table.capacity == FIRST_ROOM && memcmp(&found, &unwritten, sizeof found) == 0)
        return 0;
    if (memcmp(found.magic, magic, sizeof magic) != 0)
        return ndm_i_fail_io(EEXIST, not_a_table);
    return found.inode == data->inode && found.born == data->born;
}

int ndm_i_slots_open(ndm_i_slots *slots, const char *path, const ndm_i_backing *data)
{
    *slots = (ndm_i_slots){.first_free = NDM_I_NO_SLOT, .table.fd = -1};
    if (!path)
        return ndm_i_backing_open_unnamed(&slots->table, NULL);

    int has_data = ndm_i_backing_has_data(data);
    if (has_data < 0)
        return has_data;
    int status = ndm_i_backing_open(&slots->table, path, !has_data);
    if (has_data && status == NDM_ERR_IO && ndm_last_error()->os_errno == ENOENT)
        return ndm_i_fail_io(EEXIST, foreign_data);
    if (status != NDM_OK)
        return status;
    int ours = recognise(slots, data);
    if (ours < 0)
        status = ours;
    else if (has_data && !ours)
        status = ndm_i_fail_io(EEXIST, foreign_data);
    if (status != NDM_OK)
        ndm_i_slots_close(slots, NULL);
    return status;
}

/* Get blocks for the table from `start` on, so that its records can be stored to. */
static int fill(ndm_i_backing *table, uint64_t start)
{
    int refused = ndm_i_backing_allocate(table, start, table->capacity);
    if (!refused)
        refused = ndm_i_backing_write(table, NULL, table->capacity - start, start);
    return refused ? ndm_i_fail_io(refused, "cannot get room for the slot table") : NDM_OK;
}

int ndm_i_slots_start(ndm_i_slots *slots, const ndm_i_backing *data)
{
    int status = ndm_i_backing_start(&slots->table, FIRST_ROOM, FIRST_ROOM);
    if (status == NDM_OK)
        status = fill(&slots->table, 0);
    if (status != NDM_OK)
        return status;
    struct header *header = header_of(slots);
    *header = (struct header){.version = VERSION,
                              .byte_order = BYTE_ORDER_MARK,
                              .page_size = (uint32_t)sysconf(_SC_PAGESIZE),
                              .record_size = sizeof(ndm_i_record),
                              .inode = data->inode,
                              .born = data->born};
    memcpy(header->magic, magic, sizeof magic);
    return NDM_OK;
}

void ndm_i_slots_close(ndm_i_slots *slots, const char *unlink_path)
{
    ndm_i_backing_close(&slots->table, unlink_path);
    slots->count = slots->live = 0;
    slots->first_free = NDM_I_NO_SLOT;
}

ndm_i_record *ndm_i_slots_record(const ndm_i_slots *slots, int64_t slot)
{
    if (slot < 0 || (uint64_t)slot >= slots->count)
        return NULL;
    return &records_of(slots)[slot];
}

int ndm_i_slots_reserve(ndm_i_slots *slots, uint64_t count)
{
    const uint64_t reusable = slots->count - slots->live;
    const uint64_t needed = count > reusable ? slots->count + (count - reusable) : 0;
    if (needed <= room(slots))
        return NDM_OK;
    if (needed > MOST_SLOTS)
        return ndm_i_fail(NDM_ERR_MEMORY, "the region has as many slots as can be numbered");
    const uint64_t old = slots->table.capacity;
    uint64_t wanted = old * 2;
    while (wanted < HEADER_ROOM + needed * sizeof(ndm_i_record))
        wanted *= 2;
    int status = ndm_i_backing_grow(&slots->table, wanted, wanted, wanted);
    if (status != NDM_OK)
        return status;
    status = fill(&slots->table, old);
    if (status != NDM_OK)
        ndm_i_backing_shrink(&slots->table, old);
    return status;
}

uint32_t ndm_i_slots_next(const ndm_i_slots *slots)
{
    return slots->first_free != NDM_I_NO_SLOT ? slots->first_free : (uint32_t)slots->count;
}

uint32_t ndm_i_slots_add(ndm_i_slots *slots, uint64_t offset, uint64_t size, uint8_t engine, uint32_t extent)
{
    assert(offset < NDM_I_SIZE_LIMIT && size < NDM_I_SIZE_LIMIT);
    uint32_t slot = ndm_i_slots_next(slots);
    ndm_i_record *record = &records_of(slots)[slot];
    if (slot == slots->first_free)
        slots->first_free = ndm_i_record_link(record);
    else
        slots->count++;
    assert(slots->count <= room(slots));
    record->place = offset;
    record->life = ndm_i_record_generation(record) | (uint64_t)extent << 32;
    record->shape = size | (uint64_t)engine << 48 | (uint64_t)NDM_I_LIVE << 56;
    slots->live++;
    return slot;
}

void ndm_i_slots_move(ndm_i_slots *slots, uint32_t slot, uint64_t offset, uint32_t extent)
{
    ndm_i_record *record = &records_of(slots)[slot];
    const uint64_t moves = (record->place >> 48) + 1;
    record->place = offset | moves << 48;
    record->life = ndm_i_record_generation(record) | (uint64_t)extent << 32;
}

void ndm_i_slots_remove(ndm_i_slots *slots, uint32_t slot)
{
    ndm_i_record *record = &records_of(slots)[slot];
    assert(ndm_i_record_state(record) == NDM_I_LIVE);
    record->shape ^= (uint64_t)(NDM_I_LIVE ^ NDM_I_FREED) << 56;
    record->life = (uint32_t)(ndm_i_record_generation(record) + 1) | (uint64_t)slots->first_free << 32;
    slots->first_free = slot;
    slots->live--;
}

uint64_t ndm_i_slots_check(const ndm_i_slots *slots)
{
    uint64_t broken = 0, live = 0, chained = 0;
    for (uint64_t i = 0; i < slots->count; i++) {
        uint8_t state = ndm_i_record_state(&records_of(slots)[i]);
        live += state == NDM_I_LIVE;
        broken += state != NDM_I_LIVE && state != NDM_I_FREED;
    }
    for (uint32_t slot = slots->first_free; slot != NDM_I_NO_SLOT && chained <= slots->count; chained++) {
        if (slot >= slots->count || ndm_i_record_state(&records_of(slots)[slot]) != NDM_I_FREED)
            return broken + 1;
        slot = ndm_i_record_link(&records_of(slots)[slot]);
    }
    broken += live != slots->live;
    broken += chained != slots->count - live;
    return broken + (slots->count > room(slots));
}
