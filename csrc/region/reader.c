/* The read-only side: any thread, any process, while the owner works. How it stays true without a lock on the owner's
 * path is told in slots.h. */
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
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

/* How many slots are looked at in one call. */
enum { LOOKS = 100000 };

/* ---- opening and closing -------------------------------------------------------------------------------- */

static void free_paths(ndm_reader *reader)
{
    free(reader->data_path);
    free(reader->leases_path);
}

static void let_go(ndm_reader *reader)
{
    if (atomic_fetch_sub(&reader->holders, 1) > 1)
        return;
    pthread_mutex_destroy(&reader->lock);
    free_paths(reader);
    free(reader);
}

/* The reader is closed and its last view has ended. Until then its lock keeps the owner from shortening the file. */
static void last_use(ndm_i_home *home)
{
    ndm_reader *reader = (ndm_reader *)((char *)home - offsetof(ndm_reader, home));
    ndm_i_file_close(&reader->slots, NULL);
    ndm_i_fork_remove(&reader->at_fork);
    let_go(reader);
}

static void unmap(ndm_reader *reader)
{
    ndm_i_fork_bar();
    ndm_i_mapping_unref(reader->values);
    ndm_i_mapping_unref(reader->table);
    reader->values = reader->table = NULL;
    ndm_i_fork_let();
}

static void close_files(ndm_reader *reader)
{
    ndm_i_leases_close(&reader->leases);
    unmap(reader);
    ndm_i_file_close(&reader->data, NULL);
}

/* Unless that has been done. The reader may go. */
static void leave_home(ndm_reader *reader)
{
    ndm_i_fork_bar();
    const bool stays = !reader->home_left;
    reader->home_left = true;
    if (stays)
        ndm_i_home_leave(&reader->home);
    ndm_i_fork_let();
}

/* In a forked child: as an owner's region does. */
static void leave(ndm_reader *reader, bool waited)
{
    reader->left = true;
    ndm_i_fork_remove(&reader->at_fork);
    ndm_i_file_abandon(&reader->slots);
    ndm_i_file_abandon(&reader->data);
    ndm_i_file_abandon(&reader->leases.file);
    if (!waited && pthread_mutex_trylock(&reader->lock) != 0) /* a thread of the parent's may have been inside a verb */
        return;
    unmap(reader);
    leave_home(reader);
}

static void leave_in_child(void *reader) { leave(reader, true); }

/* Is it the table of our data file? Read, not mapped: nothing has been locked yet. */
static int check_table(const ndm_reader *reader)
{
    ndm_i_header header;
    if (ndm_i_file_size(&reader->slots) < NDM_I_HEADER_ROOM)
        return ndm_i_fail_io(EINVAL, "the slot table is cut short");
    const int status = ndm_i_file_load(&reader->slots, 0, &header, sizeof header);
    return status == NDM_OK ? ndm_i_header_check(&header, &reader->data) : status;
}

/* The lock comes after the check: a file that is none of ours is left alone. The owner may have changed the table meanwhile. */
static int open_slots(ndm_reader *reader, const char *path)
{
    int status = ndm_i_file_open_to_read(&reader->slots, path);
    if (status != NDM_OK)
        return ndm_i_fail_io(ndm_last_error()->os_errno, "cannot open the slot table");
    if ((status = check_table(reader)) != NDM_OK || (status = ndm_i_file_flock_to_read(&reader->slots)) != NDM_OK ||
        (status = check_table(reader)) != NDM_OK)
        return status;
    ndm_i_fork_bar();
    reader->table = ndm_i_mapping_new_to_read(reader->slots.fd, ndm_i_file_size(&reader->slots));
    ndm_i_fork_let();
    if (!reader->table)
        return ndm_last_error()->status;
    const ndm_i_header *header = ndm_i_reader_header(reader);
    const uint64_t count = atomic_load(&header->count);
    reader->incarnation = atomic_load(&header->incarnation);
    if (reader->incarnation == 0 || count > NDM_I_NO_SLOT ||
        count > (reader->table->length - NDM_I_HEADER_ROOM) / sizeof(ndm_i_record))
        return ndm_i_fail_io(EINVAL, "the slot table is cut short, or being made");
    if (!ndm_i_is_alignment(header->alignment))
        return ndm_i_fail_io(EUCLEAN, "the slot table is torn: no values have its alignment");
    return NDM_OK;
}

static int open_files(ndm_reader *reader, const char *data_path, const char *slots_path)
{
    const int status = ndm_i_file_open_to_read(&reader->data, data_path);
    return status == NDM_OK ? (int)ndm_i_of_file(NDM_FILE_SLOTS, open_slots(reader, slots_path)) : status;
}

static ndm_reader *open_once(const char *data_path, const char *slots_path, const char *leases_path)
{
    ndm_reader *reader = calloc(1, sizeof *reader);
    if (!reader || !(reader->data_path = strdup(data_path)) || !(reader->leases_path = strdup(leases_path))) {
        if (reader)
            free_paths(reader);
        free(reader);
        ndm_i_fail(NDM_ERR_MEMORY, "no memory for a reader");
        return NULL;
    }
    reader->data.fd = reader->slots.fd = reader->leases.file.fd = -1;
    reader->process = ndm_i_process();
    atomic_init(&reader->holders, 2);
    pthread_mutex_init(&reader->lock, NULL);
    reader->at_fork = (ndm_i_fork_entry){.in_child = leave_in_child, .context = reader};
    if (!ndm_i_home_init(&reader->home, last_use)) {
        ndm_i_fail(NDM_ERR_MEMORY, "no memory for a reader");
    } else {
        ndm_i_fork_add(&reader->at_fork);
        if (open_files(reader, data_path, slots_path) == NDM_OK)
            return reader;
    }
    close_files(reader);
    ndm_i_file_close(&reader->slots, NULL);
    ndm_i_fork_remove(&reader->at_fork);
    pthread_mutex_destroy(&reader->lock);
    free_paths(reader);
    free(reader);
    return NULL;
}

ndm_reader *ndm_reader_open(const char *data_path, const char *slots_path, const char *leases_path)
{
    const ndm_error before = *ndm_last_error();
    ndm_i_patience patience = {0};
    ndm_reader *reader;
    while (!(reader = open_once(data_path, slots_path, leases_path)) && ndm_last_error()->status == NDM_ERR_WAIT &&
           ndm_i_pause(&patience))
        ;
    ndm_i_ended(reader ? NDM_OK : NDM_ERR_IO, &before);
    return reader;
}

void ndm_reader_close(ndm_reader *reader)
{
    if (!reader || !ndm_i_is_process(reader->process))
        return;
    pthread_mutex_lock(&reader->lock);
    const bool open = reader->table != NULL;
    if (open)
        close_files(reader);
    pthread_mutex_unlock(&reader->lock);
    if (open)
        leave_home(reader);
}

void ndm_reader_destroy(ndm_reader *reader)
{
    if (!reader)
        return;
    if (ndm_i_is_process(reader->process))
        ndm_reader_close(reader);
    else if (!reader->left) /* a raw clone() ran no handlers */
        leave(reader, false);
    let_go(reader);
}

/* ---- the verbs ------------------------------------------------------------------------------------------ */

/* A verb enters, looks, and leaves; while the owner moves the value it does so again after a pause. */

static int find_once(ndm_reader *reader, int64_t slot, int64_t generation, ndm_value *out)
{
    ndm_value found;
    int status = ndm_i_reader_enter(reader);
    if (status != NDM_OK)
        return status;
    if ((status = ndm_i_reader_look_up(reader, slot, generation, &found)) == NDM_OK)
        *out = found;
    pthread_mutex_unlock(&reader->lock);
    return status;
}

int ndm_reader_find(ndm_reader *reader, int64_t slot, int64_t generation, ndm_value *out)
{
    const ndm_error before = *ndm_last_error();
    ndm_i_patience patience = {0};
    int status;
    while ((status = find_once(reader, slot, generation, out)) == NDM_ERR_WAIT && ndm_i_pause(&patience))
        ;
    return (int)ndm_i_ended(status, &before);
}

static int read_once(ndm_reader *reader, int64_t slot, int64_t generation, const char **view, ndm_value *out)
{
    ndm_value found;
    int status = ndm_i_reader_enter(reader);
    if (status != NDM_OK)
        return status;
    if ((status = ndm_i_reader_look_up(reader, slot, generation, &found)) == NDM_OK) {
        if ((*view = ndm_i_reader_fetch_view(reader, &found)))
            *out = found;
        else
            status = ndm_last_error()->status;
    }
    pthread_mutex_unlock(&reader->lock);
    return status;
}

const char *ndm_reader_read(ndm_reader *reader, int64_t slot, int64_t generation, ndm_value *out)
{
    const ndm_error before = *ndm_last_error();
    ndm_i_patience patience = {0};
    const char *view = NULL;
    while (read_once(reader, slot, generation, &view, out) == NDM_ERR_WAIT && ndm_i_pause(&patience))
        ;
    ndm_i_ended(view ? NDM_OK : NDM_ERR_IO, &before);
    return view;
}

/* Of a value that is larger than the buffer: a torn table may tell any size, and the caller makes room for it. */
static int check_size(const ndm_reader *reader, const ndm_value *value)
{
    return value->size < NDM_I_LARGE || value->offset + value->size <= ndm_i_file_size(&reader->data)
               ? NDM_OK
               : ndm_i_fail_io(EIO, "the file is shorter than its table says");
}

static int64_t copy_once(ndm_reader *reader, int64_t slot, int64_t generation, void *buffer, uint64_t capacity)
{
    ndm_value value;
    int status = ndm_i_reader_enter(reader);
    if (status != NDM_OK)
        return status;
    if ((status = ndm_i_reader_look_up(reader, slot, generation, &value)) == NDM_OK)
        status = value.size <= capacity ? ndm_i_reader_load(reader, &value, buffer) : check_size(reader, &value);
    if (status == NDM_OK && !ndm_i_reader_is_unchanged(reader, &value) && (status = ndm_i_reader_check(reader)) == NDM_OK)
        status = ndm_i_fail(NDM_ERR_WAIT, "the value keeps changing");
    pthread_mutex_unlock(&reader->lock);
    return status == NDM_OK ? (int64_t)value.size : status;
}

int64_t ndm_reader_copy(ndm_reader *reader, int64_t slot, int64_t generation, void *buffer, uint64_t capacity)
{
    const ndm_error before = *ndm_last_error();
    ndm_i_patience patience = {0};
    int64_t status;
    while ((status = copy_once(reader, slot, generation, buffer, capacity)) == NDM_ERR_WAIT && ndm_i_pause(&patience))
        ;
    return ndm_i_ended(status, &before);
}

int ndm_reader_is_unchanged(ndm_reader *reader, const ndm_value *value)
{
    const ndm_error before = *ndm_last_error();
    int status = ndm_i_reader_enter(reader);
    if (status != NDM_OK)
        return status;
    status = ndm_i_reader_is_unchanged(reader, value);
    pthread_mutex_unlock(&reader->lock);
    return (int)ndm_i_ended(status, &before);
}

/* Go on from *slot; it is where the search has ended. NDM_ERR_WAIT after LOOKS slots, too. */
static int next_once(ndm_reader *reader, uint64_t *slot, ndm_value *out)
{
    int status = ndm_i_reader_enter(reader);
    if (status != NDM_OK)
        return status;
    const uint64_t count = ndm_i_acquire(&ndm_i_reader_header(reader)->count);
    const uint64_t end = *slot < count ? ndm_i_min(count, *slot + LOOKS) : *slot;
    ndm_value found;
    status = NDM_ERR_FREED_SLOT;
    while (*slot < end && ((status = ndm_i_reader_look_up(reader, (int64_t)*slot, -1, &found)) == NDM_ERR_FREED_SLOT ||
                           status == NDM_ERR_UNCOMMITTED))
        ++*slot;
    if (status == NDM_OK)
        *out = found;
    else if (*slot >= count)
        status = ndm_i_fail(NDM_ERR_NO_SLOT, "no live slot follows");
    else if (*slot == end)
        status = ndm_i_fail(NDM_ERR_WAIT, "the slot table is long");
    pthread_mutex_unlock(&reader->lock);
    return status;
}

int ndm_reader_next(ndm_reader *reader, int64_t from, ndm_value *out)
{
    const ndm_error before = *ndm_last_error();
    ndm_i_patience patience = {0};
    uint64_t slot = from < 0 ? 0 : (uint64_t)from;
    const uint64_t first = slot;
    int status;
    while ((status = next_once(reader, &slot, out)) == NDM_ERR_WAIT && slot - first < LOOKS && ndm_i_pause(&patience))
        ;
    if (status == NDM_ERR_WAIT)
        *out = (ndm_value){.slot = (int64_t)slot};
    return (int)ndm_i_ended(status, &before);
}

int ndm_reader_stats(ndm_reader *reader, ndm_reader_figures *out)
{
    const ndm_error before = *ndm_last_error();
    int status = ndm_i_reader_enter(reader);
    if (status != NDM_OK)
        return status;
    const ndm_i_header *header = ndm_i_reader_header(reader);
    uint64_t resident, unwritten;
    const int64_t leases = ndm_i_leases_look(reader->leases_path, NULL);
    reader->data.capacity = ndm_i_file_size(&reader->data);
    const uint64_t alignment = header->alignment; /* whoever may write to the table may have changed it */
    if (!ndm_i_is_alignment(alignment))
        status = (int)ndm_i_of_file(NDM_FILE_SLOTS, ndm_i_fail_io(EUCLEAN, "the slot table is torn"));
    else if ((status = ndm_i_residency(&reader->data, &resident, &unwritten)) == NDM_OK)
        *out = (ndm_reader_figures){.incarnation = reader->incarnation,
                                    .capacity = reader->data.capacity,
                                    .max_capacity = ndm_i_acquire(&header->max_capacity),
                                    .used_bytes = ndm_i_acquire(&header->used_bytes),
                                    .live_bytes = ndm_i_acquire(&header->live_bytes),
                                    .slot_count = ndm_i_acquire(&header->count),
                                    .alignment = alignment,
                                    .owner = ndm_i_file_is_byte_locked(&reader->slots, 0) ? ndm_i_acquire(&header->owner) : 0,
                                    .pinned_bytes = ndm_i_acquire(&header->pinned_bytes),
                                    .leases = leases < 0 ? UINT64_MAX : (uint64_t)leases,
                                    .resident_bytes = resident};
    pthread_mutex_unlock(&reader->lock);
    return (int)ndm_i_ended(status, &before);
}
