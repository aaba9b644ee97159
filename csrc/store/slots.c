#define _GNU_SOURCE
#include "store/slots.h"

#include "os/owner.h"
#include "os/status.h"

#include <assert.h>
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#define FIRST_ROOM ((uint64_t)64 << 10)
#define MOST_SLOTS ((uint64_t)NDM_I_NO_SLOT)

static const char magic[8] = {'N', 'D', 'M', 'S', 'L', 'O', 'T', 'S'};
static const char foreign_data[] = "the file holds data that no overflow region wrote";
enum { VERSION = 2, BYTE_ORDER_MARK = 0x01020304 };

_Static_assert(sizeof(ndm_i_header) <= NDM_I_HEADER_ROOM, "the header fits its page");
_Static_assert(sizeof(ndm_i_record) == 24, "24 bytes a slot");

ndm_i_header *ndm_i_slots_header(const ndm_i_slots *slots) { return (ndm_i_header *)slots->table.mapping->base; }

static ndm_i_record *records_of(const ndm_i_slots *slots)
{
    return (ndm_i_record *)(slots->table.mapping->base + NDM_I_HEADER_ROOM);
}

static uint64_t room(const ndm_i_slots *slots)
{
    const uint64_t records = (slots->table.capacity - NDM_I_HEADER_ROOM) / sizeof(ndm_i_record);
    return records < MOST_SLOTS ? records : MOST_SLOTS;
}

static void publish(_Atomic uint64_t *word, uint64_t bits)
{
    atomic_store_explicit(word, bits, memory_order_release);
}

/* ---- opening -------------------------------------------------------------------------------------------- */

int ndm_i_header_check(const ndm_i_header *header, uint64_t inode, uint64_t born)
{
    if (memcmp(header->magic, magic, sizeof magic) != 0)
        return ndm_i_fail_io(EINVAL, "the file is not a slot table: its mark is missing");
    if (header->byte_order != BYTE_ORDER_MARK)
        return ndm_i_fail_io(EINVAL, "the slot table was written on a machine of the other byte order");
    if (header->version != VERSION || header->record_size != sizeof(ndm_i_record))
        return ndm_i_fail_io(EINVAL, "the slot table has a version that this library does not know");
    if (header->page_size != (uint32_t)sysconf(_SC_PAGESIZE))
        return ndm_i_fail_io(EINVAL, "the slot table was written with another page size");
    if (header->inode != inode || header->born != born)
        return ndm_i_fail_io(EINVAL, "the slot table belongs to another file");
    return NDM_OK;
}

/* 1: the table there is ours and speaks of this data file. 0: ours, but of another, or empty. Negative: not ours. */
static int recognise(ndm_i_slots *slots, const ndm_i_file *data)
{
    ndm_i_header found;
    const uint64_t there = slots->table.capacity < sizeof found ? slots->table.capacity : sizeof found;
    if (there == 0)
        return 0;
    if (ndm_i_file_load(&slots->table, 0, &found, there) != NDM_OK ||
        memcmp(found.magic, magic, there < sizeof magic ? there : sizeof magic) != 0)
        return ndm_i_fail_io(EEXIST, "path.slots exists but is not a slot table");
    if (there < sizeof found)
        return ndm_i_fail_io(EUCLEAN, "the slot table is cut short");
    if (found.byte_order == BYTE_ORDER_MARK && found.version > VERSION)
        return ndm_i_fail_io(EINVAL, "the slot table has a version that this library does not know");
    const bool ours = found.inode == data->inode && found.born == data->born;
    slots->orphaned = !ours && found.version == VERSION && ndm_i_word(&found.live_bytes) > 0;
    return ours;
}

static int in_table(int status) { return (int)ndm_i_of_file(NDM_FILE_SLOTS, status); }

int ndm_i_slots_open(ndm_i_slots *slots, const char *path, const ndm_i_file *data)
{
    *slots = (ndm_i_slots){.first_free = NDM_I_NO_SLOT, .table.fd = -1};
    if (!path)
        return in_table(ndm_i_file_open_unnamed(&slots->table, NULL));

    int has_data = ndm_i_file_has_data(data);
    if (has_data < 0)
        return has_data;
    int status = ndm_i_file_open(&slots->table, path, !has_data, NDM_I_LOCK_BYTE);
    if (has_data && status == NDM_ERR_IO && ndm_last_error()->os_errno == ENOENT)
        return ndm_i_fail_io(EEXIST, foreign_data);
    if (status != NDM_OK)
        return in_table(status);
    int ours = recognise(slots, data);
    if (ours < 0)
        status = in_table(ours);
    else if (has_data && !ours)
        status = ndm_i_fail_io(EEXIST, foreign_data);
    if (status != NDM_OK)
        ndm_i_slots_close(slots, NULL);
    slots->ours = ours > 0;
    return status;
}

int ndm_i_slots_invalidate(ndm_i_slots *slots)
{
    static const uint64_t none = 0;
    if (slots->table.capacity < sizeof(ndm_i_header))
        return NDM_OK;
    const int refused =
        ndm_i_file_write(&slots->table, (const uint8_t *)&none, sizeof none, offsetof(ndm_i_header, incarnation));
    return refused ? ndm_i_fail_io(refused, "cannot write the slot table") : NDM_OK;
}

/* Get blocks for the table, and zeros from `start` on, so that its records can be stored to. */
static int fill(ndm_i_file *table, uint64_t start)
{
    int refused = ndm_i_file_allocate(table, 0, table->capacity);
    if (!refused)
        refused = ndm_i_file_write(table, NULL, table->capacity - start, start);
    return refused ? ndm_i_fail_io(refused, "cannot get room for the slot table") : NDM_OK;
}

/* A number that no other opening of a region gets. */
static uint64_t fresh_incarnation(void)
{
    uint64_t number = 0;
    while (number == 0)
        if (getrandom(&number, sizeof number, 0) != sizeof number)
            number = (uint64_t)time(NULL) << 32 ^ (uint64_t)getpid() << 16 ^ (uint64_t)clock();
    return number;
}

static int start(ndm_i_slots *slots, const ndm_i_file *data, uint64_t alignment)
{
    /* The mark comes first, so that a table that was not finished is known as ours; it has no incarnation yet. A table
     * that readers may have mapped is never shortened. */
    ndm_i_header header = {.version = VERSION,
                           .byte_order = BYTE_ORDER_MARK,
                           .page_size = (uint32_t)sysconf(_SC_PAGESIZE),
                           .record_size = sizeof(ndm_i_record),
                           .alignment = alignment,
                           .inode = data->inode,
                           .born = data->born};
    memcpy(header.magic, magic, sizeof magic);
    if (slots->table.capacity == 0)
        ndm_i_file_overwrite_in_place(&slots->table);
    int refused = ndm_i_file_write(&slots->table, (const uint8_t *)&header, sizeof header, 0);
    if (refused)
        return ndm_i_fail_io(refused, "cannot write the slot table");
    const uint64_t capacity = slots->table.capacity > FIRST_ROOM ? slots->table.capacity : FIRST_ROOM;
    int status = ndm_i_file_start(&slots->table, capacity, capacity, true);
    if (status == NDM_OK)
        status = fill(&slots->table, NDM_I_HEADER_ROOM);
    if (status != NDM_OK)
        return status;
    slots->started = true;
    publish(&ndm_i_slots_header(slots)->owner, (uint64_t)getpid());
    publish(&ndm_i_slots_header(slots)->incarnation, fresh_incarnation());
    return NDM_OK;
}

int ndm_i_slots_start(ndm_i_slots *slots, const ndm_i_file *data, uint64_t alignment)
{
    return in_table(start(slots, data, alignment));
}

static int adopt(ndm_i_slots *slots, const ndm_i_file *data)
{
    if (slots->table.capacity < NDM_I_HEADER_ROOM)
        return ndm_i_fail_io(EUCLEAN, "the slot table is cut short");
    int status = ndm_i_file_start(&slots->table, slots->table.capacity, slots->table.capacity, true);
    if (status != NDM_OK)
        return status;
    ndm_i_header *header = ndm_i_slots_header(slots);
    if ((status = ndm_i_header_check(header, data->inode, data->born)) != NDM_OK)
        return status;
    slots->count = ndm_i_word(&header->count);
    if (slots->count > room(slots) || ndm_i_word(&header->incarnation) == 0 || header->alignment == 0 ||
        header->alignment > 4096 || (header->alignment & (header->alignment - 1)) != 0)
        return ndm_i_fail_io(EUCLEAN, "the slot table is torn");
    /* The owner may have died between making the table longer and getting blocks for that. */
    const int refused = ndm_i_file_allocate(&slots->table, 0, slots->table.capacity);
    if (refused)
        return ndm_i_fail_io(refused, "cannot get room for the slot table");
    slots->started = true;
    publish(&header->owner, (uint64_t)getpid());
    return NDM_OK;
}

int ndm_i_slots_adopt(ndm_i_slots *slots, const ndm_i_file *data) { return in_table(adopt(slots, data)); }

void ndm_i_slots_close(ndm_i_slots *slots, const char *unlink_path)
{
    if (slots->started && ndm_i_is_process(slots->table.process)) /* a child's end is not the owner's */
        publish(&ndm_i_slots_header(slots)->owner, 0);
    ndm_i_file_close(&slots->table, unlink_path);
    slots->started = false;
    slots->count = slots->live = slots->retired = 0;
    slots->first_free = NDM_I_NO_SLOT;
}

bool ndm_i_slots_bar_readers(ndm_i_slots *slots) { return ndm_i_file_flock(&slots->table, true); }

void ndm_i_slots_let_readers(ndm_i_slots *slots) { ndm_i_file_flock(&slots->table, false); }

/* ---- records -------------------------------------------------------------------------------------------- */

ndm_i_record *ndm_i_slots_record(const ndm_i_slots *slots, int64_t slot)
{
    if (slot < 0 || (uint64_t)slot >= slots->count)
        return NULL;
    return &records_of(slots)[slot];
}

int ndm_i_slots_reserve(ndm_i_slots *slots, uint64_t count)
{
    const uint64_t reusable = slots->count - slots->live - slots->retired;
    if (count <= reusable || count - reusable <= room(slots) - slots->count)
        return NDM_OK;
    if (count - reusable > MOST_SLOTS - slots->count)
        return ndm_i_fail(NDM_ERR_MEMORY, "the region has as many slots as can be numbered");
    const uint64_t old = slots->table.capacity, needed = slots->count + (count - reusable);
    uint64_t wanted = old * 2;
    while (wanted < NDM_I_HEADER_ROOM + needed * sizeof(ndm_i_record))
        wanted *= 2;
    int status = ndm_i_file_grow(&slots->table, wanted, wanted, wanted);
    if (status != NDM_OK)
        return in_table(status);
    status = fill(&slots->table, old);
    if (status != NDM_OK)
        ndm_i_file_shrink(&slots->table, old);
    return in_table(status);
}

static uint32_t ndm_i_slots_next(const ndm_i_slots *slots)
{
    return slots->first_free != NDM_I_NO_SLOT ? slots->first_free : (uint32_t)slots->count;
}

static uint64_t with_state(const ndm_i_record *record, uint8_t state)
{
    return (ndm_i_word(&record->shape) & ~((uint64_t)0xff << 56)) | (uint64_t)state << 56;
}

/* The value is not to be read any more; only after this may its bytes change. */
static void withdraw(ndm_i_record *record, uint8_t state)
{
    publish(&record->shape, with_state(record, state));
    atomic_thread_fence(memory_order_seq_cst); /* seq_cst for the leases: see leases.h */
}

uint32_t ndm_i_slots_add(ndm_i_slots *slots, uint64_t offset, uint64_t size, uint8_t engine, uint32_t extent,
                         uint8_t state)
{
    assert(offset < NDM_I_SIZE_LIMIT && size < NDM_I_SIZE_LIMIT);
    uint32_t slot = ndm_i_slots_next(slots);
    ndm_i_record *record = &records_of(slots)[slot];
    const bool fresh = slot != slots->first_free;
    if (!fresh)
        slots->first_free = ndm_i_record_link(record);
    assert(slot < room(slots));
    publish(&record->place, offset);
    publish(&record->life, ndm_i_record_generation(record) | (uint64_t)extent << 32);
    publish(&record->shape, size | (uint64_t)engine << 48 | (uint64_t)state << 56);
    if (fresh)
        publish(&ndm_i_slots_header(slots)->count, ++slots->count);
    slots->live++;
    return slot;
}

void ndm_i_slots_commit(ndm_i_slots *slots, uint32_t slot)
{
    ndm_i_record *record = &records_of(slots)[slot];
    publish(&record->shape, with_state(record, NDM_I_LIVE));
}

void ndm_i_slots_set_extent(ndm_i_slots *slots, uint32_t slot, uint32_t extent)
{
    ndm_i_record *record = &records_of(slots)[slot];
    publish(&record->life, ndm_i_record_generation(record) | (uint64_t)extent << 32);
}

void ndm_i_slots_move_begin(ndm_i_slots *slots, uint32_t slot, uint64_t offset)
{
    ndm_i_header *header = ndm_i_slots_header(slots);
    ndm_i_record *record = &records_of(slots)[slot];
    publish(&header->move_from, ndm_i_record_offset(record));
    publish(&header->move_to, offset);
    publish(&header->moved, 0);
    publish(&header->move_slot, (uint64_t)slot + 1);
    if (ndm_i_record_state(record) == NDM_I_LIVE) /* readers do not see a draft */
        withdraw(record, NDM_I_MOVING);
}

void ndm_i_slots_move_end(ndm_i_slots *slots, uint32_t slot, uint64_t offset, uint32_t extent)
{
    ndm_i_record *record = &records_of(slots)[slot];
    const uint64_t moves = (ndm_i_word(&record->place) >> 48) + 1;
    if (moves >> 16 != 0) { /* before the place, so that who sees a move of the new turn sees the turn */
        ndm_i_header *header = ndm_i_slots_header(slots);
        publish(&header->turns, ndm_i_word(&header->turns) + 1);
    }
    publish(&record->place, offset | moves << 48);
    ndm_i_slots_set_extent(slots, slot, extent);
    ndm_i_slots_move_cancel(slots, slot);
}

void ndm_i_slots_move_cancel(ndm_i_slots *slots, uint32_t slot)
{
    ndm_i_record *record = &records_of(slots)[slot];
    if (ndm_i_record_state(record) == NDM_I_MOVING)
        publish(&record->shape, with_state(record, NDM_I_LIVE));
    publish(&ndm_i_slots_header(slots)->move_slot, 0);
}

static bool is_retired(const ndm_i_record *record)
{
    return ndm_i_record_state(record) == NDM_I_FREED && ndm_i_record_generation(record) == NDM_I_LAST_GENERATION;
}

/* A freed slot gets its next generation, and may be given out again unless that is the last one. */
static void chain(ndm_i_slots *slots, uint32_t slot)
{
    ndm_i_record *record = &records_of(slots)[slot];
    const uint32_t generation = ndm_i_record_generation(record);
    if (generation >= NDM_I_LAST_GENERATION - 1) {
        publish(&record->life, NDM_I_LAST_GENERATION | (uint64_t)NDM_I_NO_SLOT << 32);
        slots->retired++;
        return;
    }
    publish(&record->life, (generation + 1) | (uint64_t)slots->first_free << 32);
    slots->first_free = slot;
}

void ndm_i_slots_remove(ndm_i_slots *slots, uint32_t slot)
{
    ndm_i_record *record = &records_of(slots)[slot];
    assert(ndm_i_record_is_live(record));
    withdraw(record, NDM_I_FREED);
    chain(slots, slot);
    slots->live--;
}

void ndm_i_slots_rebuild(ndm_i_slots *slots)
{
    slots->live = slots->retired = 0;
    slots->first_free = NDM_I_NO_SLOT;
    for (uint64_t i = slots->count; i-- > 0;) {
        ndm_i_record *record = &records_of(slots)[i];
        if (ndm_i_record_state(record) == NDM_I_LIVE) {
            slots->live++;
            continue;
        }
        /* A generation of its own in any case: the owner may have died between withdrawing the value and that. */
        publish(&record->shape, with_state(record, NDM_I_FREED));
        chain(slots, (uint32_t)i);
    }
}

uint64_t ndm_i_slots_check(const ndm_i_slots *slots)
{
    uint64_t broken = 0, live = 0, retired = 0, chained = 0;
    for (uint64_t i = 0; i < slots->count; i++) {
        uint8_t state = ndm_i_record_state(&records_of(slots)[i]);
        const bool holds = ndm_i_record_is_live(&records_of(slots)[i]);
        live += holds;
        retired += is_retired(&records_of(slots)[i]);
        broken += !holds && state != NDM_I_FREED;
    }
    for (uint32_t slot = slots->first_free; slot != NDM_I_NO_SLOT && chained <= slots->count; chained++) {
        if (slot >= slots->count || ndm_i_record_state(&records_of(slots)[slot]) != NDM_I_FREED ||
            is_retired(&records_of(slots)[slot]))
            return broken + 1;
        slot = ndm_i_record_link(&records_of(slots)[slot]);
    }
    broken += live != slots->live;
    broken += ndm_i_word(&ndm_i_slots_header(slots)->count) != slots->count;
    broken += retired != slots->retired;
    broken += chained != slots->count - live - retired;
    return broken + (slots->count > room(slots));
}
