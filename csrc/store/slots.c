#define _GNU_SOURCE
#include "store/slots.h"

#include "os/bits.h"
#include "os/bytes.h"
#include "os/fork.h"
#include "os/locks.h"
#include "os/owner.h"
#include "os/status.h"
#include "store/kinship.h"

#include <assert.h>
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define FIRST_ROOM ((uint64_t)64 << 10)

/* The larger a folio, the longer a store to a page of it takes that was written back, and the more is written back for it; and
 * a folio is as large as the write that made it. Records are stored to at random: 3 us in pieces of 32 KiB, 20 to 40 in grains
 * (write_paths.c). Smaller pieces take longer to fill. */
#define PIECE ((uint64_t)32 << 10)

#define MOST_SLOTS ((uint64_t)NDM_I_NO_SLOT)

static const char magic[8] = {'N', 'D', 'M', 'S', 'L', 'O', 'T', 'S'};
enum { VERSION = 3, BYTE_ORDER_MARK = 0x01020304 };

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

/* Does the header say that it is a table that this library can read? */
static int check_kind(const ndm_i_header *header)
{
    if (memcmp(header->magic, magic, sizeof magic) != 0)
        return ndm_i_fail_io(EINVAL, "the file is not a slot table: its mark is missing");
    if (header->byte_order != BYTE_ORDER_MARK)
        return ndm_i_fail_io(EINVAL, "the slot table was written on a machine of the other byte order");
    if (header->version != VERSION || header->record_size != sizeof(ndm_i_record))
        return ndm_i_fail_io(EINVAL, "the slot table has a version that this library does not know");
    if (header->page_size != (uint32_t)sysconf(_SC_PAGESIZE))
        return ndm_i_fail_io(EINVAL, "the slot table was written with another page size");
    return NDM_OK;
}

int ndm_i_header_check(const ndm_i_header *header, const ndm_i_file *data)
{
    const int status = check_kind(header);
    return status == NDM_OK ? ndm_i_kinship_check(ndm_i_kinship_of(header, data)) : status;
}

/* Look at the file that stands where the table belongs. */
static int recognise(ndm_i_slots *slots)
{
    ndm_i_header *before = &slots->before;
    const uint64_t there = slots->table.capacity < sizeof *before ? slots->table.capacity : sizeof *before;
    slots->found = NDM_I_NO_TABLE;
    if (there == 0)
        return NDM_OK;
    if (ndm_i_file_load(&slots->table, 0, before, there) != NDM_OK ||
        memcmp(before->magic, magic, there < sizeof magic ? there : sizeof magic) != 0)
        return ndm_i_fail_io(EEXIST, "path.slots exists but is not a slot table");
    /* The first page of a table of any version is there, unless its owner died in the middle of making it. */
    const bool vacant = there >= offsetof(ndm_i_header, count) && ndm_i_word(&before->incarnation) == 0;
    if (there < sizeof *before && !vacant)
        return ndm_i_fail_io(EUCLEAN, "the slot table is cut short");
    if (before->byte_order == BYTE_ORDER_MARK && before->version > VERSION)
        return ndm_i_fail_io(EINVAL, "the slot table has a version that this library does not know");
    slots->found = vacant                       ? NDM_I_VACANT_TABLE
                   : before->version == VERSION ? NDM_I_TABLE
                                                : NDM_I_OLDER_TABLE;
    if (before->version != VERSION) /* beyond these fields it is another */
        memset((char *)before + offsetof(ndm_i_header, count), 0, sizeof *before - offsetof(ndm_i_header, count));
    return NDM_OK;
}

static int in_table(int status) { return (int)ndm_i_of_file(NDM_FILE_SLOTS, status); }

int ndm_i_slots_open(ndm_i_slots *slots, const char *path, bool create)
{
    ndm_i_fork_bar(); /* all zeros would be descriptor 0 */
    *slots = (ndm_i_slots){.first_free = NDM_I_NO_SLOT, .table.fd = -1, .named = path != NULL};
    ndm_i_fork_let();
    if (!path)
        return in_table(ndm_i_file_open_unnamed(&slots->table, NULL));
    int status = ndm_i_file_open(&slots->table, path, create, NDM_I_LOCK_BYTE);
    if (status != NDM_OK)
        return in_table(status);
    if ((status = recognise(slots)) != NDM_OK)
        ndm_i_slots_close(slots, NULL);
    return in_table(status);
}

/* Get blocks for the table, and zeros from `start` on, so that its records can be stored to. */
static int fill(ndm_i_file *table, uint64_t start)
{
    int refused = ndm_i_file_allocate(table, 0, table->capacity);
    for (uint64_t at = start; at < table->capacity && !refused; at += PIECE)
        refused = ndm_i_file_write(table, NULL, ndm_i_min(PIECE, table->capacity - at), at);
    return refused ? ndm_i_fail_io(refused, "cannot get room for the slot table") : NDM_OK;
}

/* A number that no other opening of a region gets. */
static uint64_t fresh_incarnation(void)
{
    uint64_t number = 0;
    while (number == 0)
        number = ndm_i_identity_fresh().words[0];
    return number;
}

/* The header of an empty table. It has no incarnation yet. */
static ndm_i_header new_header(uint64_t alignment)
{
    ndm_i_header header = {.version = VERSION,
                           .byte_order = BYTE_ORDER_MARK,
                           .page_size = (uint32_t)sysconf(_SC_PAGESIZE),
                           .record_size = sizeof(ndm_i_record),
                           .alignment = alignment};
    memcpy(header.magic, magic, sizeof magic);
    return header;
}

static int write_header(const ndm_i_slots *slots, const ndm_i_header *header)
{
    const int refused = ndm_i_file_write(&slots->table, (const uint8_t *)header, sizeof *header, 0);
    return refused ? ndm_i_fail_io(refused, "cannot write the slot table") : NDM_OK;
}

static int prepare(ndm_i_slots *slots, const ndm_i_file *data)
{
    /* The mark comes first, so that a table that was not finished is known as ours. A table that readers may have mapped
     * is never shortened. */
    int status = ndm_i_file_check_writable(&slots->table, ndm_i_max(slots->table.capacity, FIRST_ROOM));
    if (status == NDM_OK && slots->table.capacity == 0) {
        ndm_i_header header = new_header(1);
        atomic_init(&header.inode, data->inode);
        atomic_init(&header.born, data->born);
        ndm_i_file_overwrite_in_place(&slots->table);
        status = write_header(slots, &header);
    }
    if (status == NDM_OK)
        status = ndm_i_file_start(&slots->table, FIRST_ROOM, FIRST_ROOM);
    if (status != NDM_OK)
        return status;
    const int refused = ndm_i_file_get_blocks(&slots->table);
    return refused ? ndm_i_fail_io(refused, "cannot get room for the slot table") : NDM_OK;
}

int ndm_i_slots_prepare(ndm_i_slots *slots, const ndm_i_file *data) { return in_table(prepare(slots, data)); }

void ndm_i_slots_invalidate(ndm_i_slots *slots)
{
    publish(&ndm_i_slots_header(slots)->incarnation, 0);
    atomic_thread_fence(memory_order_seq_cst); /* see leases.h */
}

static int start(ndm_i_slots *slots, const ndm_i_file *data, uint64_t alignment)
{
    ndm_i_header header = new_header(alignment);
    atomic_init(&header.inode, data->inode);
    atomic_init(&header.born, data->born);
    if (slots->named)
        ndm_i_kinship_begin(&header, data, slots->found != NDM_I_NO_TABLE ? &slots->before : NULL);
    int status = write_header(slots, &header);
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
    int status = ndm_i_file_start(&slots->table, slots->table.capacity, slots->table.capacity);
    if (status != NDM_OK)
        return status;
    ndm_i_header *header = ndm_i_slots_header(slots);
    if ((status = ndm_i_header_check(header, data)) != NDM_OK)
        return status;
    slots->count = ndm_i_word(&header->count);
    if (slots->count > room(slots) || ndm_i_word(&header->incarnation) == 0 || !ndm_i_is_alignment(header->alignment))
        return ndm_i_fail_io(EUCLEAN, "the slot table is torn");
    /* The owner may have died between making the table longer and getting blocks for that; a copy may be sparse. */
    const int refused = ndm_i_file_get_blocks(&slots->table);
    return refused ? ndm_i_fail_io(refused, "cannot get room for the slot table") : NDM_OK;
}

int ndm_i_slots_adopt(ndm_i_slots *slots, const ndm_i_file *data) { return in_table(adopt(slots, data)); }

void ndm_i_slots_take_over(ndm_i_slots *slots, const ndm_i_file *data)
{
    ndm_i_kinship_renew(ndm_i_slots_header(slots), data);
    slots->started = true;
    publish(&ndm_i_slots_header(slots)->owner, (uint64_t)getpid());
}

/* A forked child's end is not the owner's. */
static bool may_end(const ndm_i_slots *slots) { return slots->started && ndm_i_is_process(slots->table.process); }

void ndm_i_slots_seal(ndm_i_slots *slots, const ndm_i_file *data)
{
    if (may_end(slots))
        ndm_i_kinship_seal(ndm_i_slots_header(slots), data);
}

void ndm_i_slots_close(ndm_i_slots *slots, const char *unlink_path)
{
    if (may_end(slots))
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

/* Give the table this size. */
static int grow_to(ndm_i_slots *slots, uint64_t size)
{
    const uint64_t old = slots->table.capacity;
    int status = ndm_i_file_grow(&slots->table, size, size, size);
    if (status != NDM_OK)
        return status;
    status = fill(&slots->table, old);
    if (status != NDM_OK)
        ndm_i_file_shrink(&slots->table, old);
    return status;
}

/* Room for `count` records more. The table doubles, while that takes no more than a quarter of what the disk has left; where
 * it would, or is refused, it grows by half of what that has to spare, a quarter, and so on, or by the need itself. */
static __attribute__((noinline)) int grow(ndm_i_slots *slots, uint64_t count)
{
    enum { LEAST_SHARE = 64 };
    if (count > MOST_SLOTS - slots->count)
        return ndm_i_fail(NDM_ERR_MEMORY, "the region has as many slots as can be numbered");
    const uint64_t old = slots->table.capacity, unit = (uint64_t)sysconf(_SC_PAGESIZE);
    const uint64_t needed = ndm_i_round_up(NDM_I_HEADER_ROOM + (slots->count + count) * sizeof(ndm_i_record), unit);
    const uint64_t left = ndm_i_file_disk_free(&slots->table) / 4;
    uint64_t twice = old * 2;
    while (twice < needed)
        twice *= 2;
    for (uint64_t share = 1; share <= LEAST_SHARE; share *= 2) {
        const uint64_t wanted = ndm_i_round_up(needed + (twice - needed) / share, unit);
        if (wanted - old <= left && grow_to(slots, wanted) == NDM_OK)
            return NDM_OK;
    }
    return in_table(grow_to(slots, needed));
}

int ndm_i_slots_reserve(ndm_i_slots *slots, uint64_t count)
{
    const uint64_t reusable = slots->count - slots->live - slots->retired;
    if (count <= reusable || count - reusable <= room(slots) - slots->count)
        return NDM_OK;
    return grow(slots, count - reusable);
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
