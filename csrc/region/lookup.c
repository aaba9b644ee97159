/* Finding a value in a table that its owner, in another thread or process, is writing to. */
#define _GNU_SOURCE
#include "region/lookup.h"

#include "os/bits.h"
#include "os/bytes.h"
#include "os/locks.h"
#include "os/owner.h"
#include "os/patience.h"
#include "os/residency.h"
#include "os/status.h"
#include "store/store.h"

#include <errno.h>
#include <string.h>

/* How often a record that changes under the eyes is read again at once. */
enum { GLANCES = 100 };

/* So long a file's size is taken to be what it was, in nanoseconds. Nobody cuts a file short and comes back sooner; and who
 * reads in a loop pays for one system call in many look-ups. */
#define FRESH ((uint64_t)2000)

/* Copies of this size and more are made by system calls. */
#define LOAD_FROM ((uint64_t)16 << 10)

int ndm_i_reader_check(const ndm_reader *reader)
{
    if (atomic_load(&ndm_i_reader_header(reader)->incarnation) == reader->incarnation)
        return NDM_OK;
    return ndm_i_fail(NDM_ERR_STALE, "the region has been opened anew: its values are gone");
}

/* Is the file that long? */
static bool reaches(const ndm_i_file *file, ndm_i_length *length, uint64_t needed, uint64_t moment)
{
    if (moment >= length->until || length->bytes < needed)
        *length = (ndm_i_length){.bytes = ndm_i_file_size(file), .until = moment + FRESH};
    return length->bytes >= needed;
}

static int cut_short(void)
{
    return (int)ndm_i_of_file(NDM_FILE_SLOTS, ndm_i_fail_io(EIO, "the slot table is cut short"));
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
    /* Who may write to the table may have cut it short: to touch what is missing would be SIGBUS. */
    reader->moment = ndm_i_now();
    const int status = reaches(&reader->slots, &reader->slots_length, NDM_I_HEADER_ROOM, reader->moment)
                           ? ndm_i_reader_check(reader)
                           : cut_short();
    if (status != NDM_OK)
        pthread_mutex_unlock(&reader->lock);
    return status;
}

/* Have `length` bytes of a file mapped; views keep an outgrown mapping. */
static int reach(const ndm_i_file *file, ndm_i_mapping **mapping, uint64_t needed, uint64_t wanted)
{
    if (*mapping && (*mapping)->length >= needed)
        return NDM_OK;
    const ndm_error before = *ndm_last_error();
    ndm_i_fork_bar();
    ndm_i_mapping *fresh = ndm_i_mapping_new_to_read(file->fd, wanted);
    if (!fresh && wanted > needed)
        fresh = ndm_i_mapping_new_to_read(file->fd, needed);
    if (fresh) {
        ndm_i_mapping_unref(*mapping);
        *mapping = fresh;
    }
    ndm_i_fork_let();
    return (int)ndm_i_ended(fresh ? NDM_OK : ndm_last_error()->status, &before);
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
static int refuse(const ndm_reader *reader, const ndm_value *found, int64_t slot, int64_t generation)
{
    const bool draft = found->state == NDM_I_DRAFT;
    if (!draft && found->state != NDM_I_FREED) {
        atomic_thread_fence(memory_order_acquire);
        const int status = ndm_i_reader_check(reader); /* an owner that starts afresh empties the table */
        return status != NDM_OK ? status
                                : (int)ndm_i_of_file(NDM_FILE_SLOTS, ndm_i_fail_io(EUCLEAN, "the slot table is torn: a "
                                                                                    "record has no known state"));
    }
    if (generation >= 0)
        return ndm_i_fail(NDM_ERR_STALE, draft && found->generation == (uint32_t)generation
                                             ? "the value is not committed yet"
                                             : "the value has been freed");
    return ndm_i_fail_slot(draft ? NDM_ERR_UNCOMMITTED : NDM_ERR_FREED_SLOT, slot);
}

static uint64_t end_of(int64_t slot) { return NDM_I_HEADER_ROOM + ((uint64_t)slot + 1) * sizeof(ndm_i_record); }

/* Have a slot's record mapped, of a table that may have grown. */
static int reach_record(ndm_reader *reader, int64_t slot)
{
    const uint64_t needed = end_of(slot);
    if (!reaches(&reader->slots, &reader->slots_length, needed, reader->moment))
        return cut_short();
    return (int)ndm_i_of_file(NDM_FILE_SLOTS, reach(&reader->slots, &reader->table, needed, reader->slots_length.bytes));
}

/* The value is being moved: by an owner that lives? Who died meanwhile, or had ended the move before, is found out by
 * looking again. */
static int await_move(const ndm_reader *reader, int64_t slot, const ndm_value *found)
{
    ndm_value again;
    if (ndm_i_file_is_byte_locked(&reader->slots, 0) || !read_record(record_of(reader, slot), &again) ||
        again.state != NDM_I_MOVING || again.generation != found->generation)
        return ndm_i_fail(NDM_ERR_WAIT, "the value is being moved");
    return ndm_i_fail(NDM_ERR_STALE, "the owner died while it moved the value; recovery ends the move");
}

int ndm_i_reader_look_up(ndm_reader *reader, int64_t slot, int64_t generation, ndm_value *out)
{
    const ndm_i_header *header = ndm_i_reader_header(reader);
    if (slot < 0 || (uint64_t)slot >= ndm_i_acquire(&header->count))
        return ndm_i_fail_slot(NDM_ERR_NO_SLOT, slot);
    const int status = reach_record(reader, slot);
    if (status != NDM_OK)
        return status;
    const uint64_t turns = ndm_i_acquire(&ndm_i_reader_header(reader)->turns); /* before the place */
    for (int glances = 0; glances < GLANCES; glances++) {
        if (!read_record(record_of(reader, slot), out))
            continue;
        if (out->state == NDM_I_MOVING)
            return await_move(reader, slot, out);
        if (out->state != NDM_I_LIVE)
            return refuse(reader, out, slot, generation);
        if (generation >= 0 && out->generation != (uint32_t)generation)
            return ndm_i_fail(NDM_ERR_STALE, "the slot holds another value now");
        out->slot = slot;
        out->turns = turns;
        return NDM_OK;
    }
    return ndm_i_fail(NDM_ERR_WAIT, "the value keeps changing");
}

bool ndm_i_reader_is_unchanged(const ndm_reader *reader, const ndm_value *value)
{
    ndm_value now;
    atomic_thread_fence(memory_order_acquire);
    if (ndm_i_reader_check(reader) != NDM_OK) /* the bytes go before the records do */
        return false;
    if (reader->slots_length.bytes < end_of(value->slot))
        return false;
    return read_record(record_of(reader, value->slot), &now) && now.state == NDM_I_LIVE &&
           now.generation == value->generation && now.place == value->place &&
           ndm_i_acquire(&ndm_i_reader_header(reader)->turns) == value->turns;
}

int ndm_i_reader_reach(ndm_reader *reader, const ndm_value *value)
{
    const uint64_t end = value->offset + value->size, ceiling = ndm_i_acquire(&ndm_i_reader_header(reader)->max_capacity);
    if (!reaches(&reader->data, &reader->data_length, end, reader->moment))
        return ndm_i_fail_io(EIO, "the file is shorter than its table says");
    return reach(&reader->data, &reader->values, end, ceiling > end ? ceiling : end);
}

/* By pread: a byte that the file has lost meanwhile, or that the disk cannot read, is an error, not SIGBUS. In pieces, because
 * some file systems let nobody write to a file while one piece is read. */
static int load(const ndm_reader *reader, const ndm_value *value, char *buffer)
{
    for (uint64_t done = 0; done < value->size;) {
        const uint64_t piece = ndm_i_min(value->size - done, NDM_I_GRAIN);
        const int64_t loaded = ndm_i_file_load_some(&reader->data, value->offset + done, buffer + done, piece);
        if (loaded < 0)
            return ndm_i_fail_io(errno, "cannot read the file");
        if ((uint64_t)loaded < piece)
            return ndm_i_fail_io(EIO, "the file is shorter than its table says");
        done += piece;
    }
    return NDM_OK;
}

__attribute__((no_sanitize("thread"))) static void copy_racing(char *to, const char *from, uint64_t size)
{
#if defined(__SANITIZE_THREAD__)
    for (uint64_t i = 0; i < size; i++)
        to[i] = ((const volatile char *)from)[i];
#else
    memcpy(to, from, size);
#endif
}

int ndm_i_reader_load(ndm_reader *reader, const ndm_value *value, char *buffer)
{
    if (value->size >= LOAD_FROM)
        return load(reader, value, buffer);
    const int status = value->size > 0 ? ndm_i_reader_reach(reader, value) : NDM_OK;
    if (status == NDM_OK && value->size > 0)
        copy_racing(buffer, (const char *)reader->values->base + value->offset, value->size);
    return status;
}

/* ---- views ---------------------------------------------------------------------------------------------- */

const char *ndm_i_reader_view(ndm_reader *reader, const ndm_value *value)
{
    if (value->size == 0)
        return ndm_i_empty_view;
    if (ndm_i_reader_reach(reader, value) != NDM_OK)
        return NULL;
    const char *view = (const char *)reader->values->base + value->offset;
    const uint64_t forget = value->size >= NDM_I_LARGE ? value->size : 0;
    /* All of the 2 MiB: readers do not know what was there before, and how large its folios were. */
    if (!ndm_i_pins_add(&reader->home, (uint32_t)value->slot, reader->values, view, forget, true, false)) {
        ndm_i_fail(NDM_ERR_MEMORY, "no memory for a view");
        return NULL;
    }
    return view;
}

const char *ndm_i_reader_fetch_view(ndm_reader *reader, const ndm_value *value)
{
    const char *view = ndm_i_reader_view(reader, value);
    if (view && value->size >= NDM_I_LARGE &&
        !ndm_i_is_cached(&reader->data, value->offset, value->offset + value->size))
        ndm_i_mapping_fetch(reader->values->base + value->offset, value->size);
    return view;
}
