/* Finding a value in a table that its owner, in another thread or process, is writing to. */
#define _GNU_SOURCE
#include "region/lookup.h"

#include "os/owner.h"
#include "os/status.h"

#include <errno.h>
#include <time.h>

/* A value that is being moved is looked at again after a pause; an owner that died in the middle never ends it, so after
 * a round of pauses it must be alive. A large value takes many rounds. */
enum { PAUSES = 200, PAUSE_NS = 50000, ROUNDS = 2000 };

int ndm_i_reader_check(const ndm_reader *reader)
{
    if (atomic_load(&ndm_i_reader_header(reader)->incarnation) == reader->incarnation)
        return NDM_OK;
    return ndm_i_fail(NDM_ERR_STALE, "the region has been opened anew: its values are gone");
}

int ndm_i_reader_enter(ndm_reader *reader)
{
    if (!reader)
        return ndm_i_fail(NDM_ERR_CLOSED, "the reader is closed");
    if (!ndm_i_is_process(reader->process))
        return ndm_i_fail(NDM_ERR_WRONG_THREAD, "the reader belongs to the process that opened it");
    pthread_mutex_lock(&reader->lock);
    if (!reader->table) {
        pthread_mutex_unlock(&reader->lock);
        return ndm_i_fail(NDM_ERR_CLOSED, "the reader is closed");
    }
    const int status = ndm_i_reader_check(reader);
    if (status != NDM_OK)
        pthread_mutex_unlock(&reader->lock);
    return status;
}

/* Have `length` bytes of a file mapped; views keep an outgrown mapping. */
static int reach(const ndm_i_file *file, ndm_i_mapping **mapping, uint64_t needed, uint64_t wanted)
{
    if (*mapping && (*mapping)->length >= needed)
        return NDM_OK;
    ndm_i_mapping *fresh = ndm_i_mapping_new_to_read(file->fd, wanted);
    if (!fresh && wanted > needed)
        fresh = ndm_i_mapping_new_to_read(file->fd, needed);
    if (!fresh)
        return ndm_last_error()->status;
    ndm_i_mapping_unref(*mapping);
    *mapping = fresh;
    return NDM_OK;
}

static const ndm_i_record *record_of(const ndm_reader *reader, int64_t slot)
{
    return (const ndm_i_record *)(reader->table->base + NDM_I_HEADER_ROOM) + slot;
}

/* Read a record as a whole. 0: it changed meanwhile. */
static bool read_record(const ndm_i_record *record, ndm_value *out)
{
    const uint64_t life = ndm_i_acquire(&record->life), shape = ndm_i_acquire(&record->shape), place = ndm_i_acquire(&record->place);
    atomic_thread_fence(memory_order_acquire);
    *out = (ndm_value){.offset = place & (NDM_I_SIZE_LIMIT - 1),
                       .size = shape & (NDM_I_SIZE_LIMIT - 1),
                       .place = place,
                       .generation = (uint32_t)life,
                       .engine = (uint8_t)(shape >> 48),
                       .state = (uint8_t)(shape >> 56)};
    return ndm_i_word(&record->shape) == shape && ndm_i_word(&record->place) == place &&
           (uint32_t)ndm_i_word(&record->life) == out->generation;
}

/* Why a slot that was seen as a whole, and neither live nor being moved, gives no value. */
static int refuse(const ndm_value *found, int64_t slot, int64_t generation)
{
    const bool draft = found->state == NDM_I_DRAFT;
    if (generation >= 0)
        return ndm_i_fail(NDM_ERR_STALE, draft && found->generation == (uint32_t)generation
                                             ? "the value is not committed yet"
                                             : "the value has been freed");
    return ndm_i_fail_slot(draft ? NDM_ERR_UNCOMMITTED : NDM_ERR_FREED_SLOT, slot);
}

int ndm_i_reader_look_up(ndm_reader *reader, int64_t slot, int64_t generation, ndm_value *out)
{
    const uint64_t count = ndm_i_acquire(&ndm_i_reader_header(reader)->count);
    if (slot < 0 || (uint64_t)slot >= count)
        return ndm_i_fail_slot(NDM_ERR_NO_SLOT, slot);
    const uint64_t needed = NDM_I_HEADER_ROOM + ((uint64_t)slot + 1) * sizeof(ndm_i_record);
    if (reader->table->length < needed) {
        const uint64_t size = ndm_i_file_size(&reader->slots);
        if (size < needed)
            return (int)ndm_i_of_file(NDM_FILE_SLOTS, ndm_i_fail_io(EIO, "the slot table is cut short"));
        int status = reach(&reader->slots, &reader->table, needed, size);
        if (status != NDM_OK)
            return (int)ndm_i_of_file(NDM_FILE_SLOTS, status);
    }
    for (int pauses = 0; pauses < PAUSES * ROUNDS; pauses++) {
        if (pauses > 0 && pauses % PAUSES == 0 && !ndm_i_file_is_byte_locked(&reader->slots, 0))
            break;
        const bool whole = read_record(record_of(reader, slot), out);
        if (whole && out->state == NDM_I_LIVE) {
            out->slot = slot;
            if (generation >= 0 && out->generation != (uint32_t)generation)
                return ndm_i_fail(NDM_ERR_STALE, "the slot holds another value now");
            return NDM_OK;
        }
        if (whole && out->state != NDM_I_MOVING)
            return refuse(out, slot, generation);
        if (whole)
            nanosleep(&(struct timespec){.tv_nsec = PAUSE_NS}, NULL);
    }
    return ndm_i_fail(NDM_ERR_STALE, "the value is being moved");
}

bool ndm_i_reader_is_unchanged(const ndm_reader *reader, const ndm_value *value)
{
    ndm_value now;
    atomic_thread_fence(memory_order_acquire);
    if (ndm_i_reader_check(reader) != NDM_OK) /* the bytes go before the records do */
        return false;
    return read_record(record_of(reader, value->slot), &now) && now.state == NDM_I_LIVE &&
           now.generation == value->generation && now.place == value->place;
}

int ndm_i_reader_reach(ndm_reader *reader, const ndm_value *value)
{
    const uint64_t end = value->offset + value->size, ceiling = ndm_i_acquire(&ndm_i_reader_header(reader)->max_capacity);
    if (end > ndm_i_file_size(&reader->data))
        return ndm_i_fail_io(EIO, "the file is shorter than its table says");
    return reach(&reader->data, &reader->values, end, ceiling > end ? ceiling : end);
}
