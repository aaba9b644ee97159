/* A reader's batches: many values in one call, each of them whole, while their owner works.
 *
 * The values are looked up first, and copied in pieces, so that other threads get their turns with the reader between them.
 * What has changed between its look-up and the end of its copy is copied once more by itself. The copies are made in the
 * order of the batch, until one takes so long that the disk may have been in it, and others are found to be missing from RAM.
 * The rest is then asked for and copied in the order of the file. */
#include "region/lookup.h"

#include "os/bits.h"
#include "os/patience.h"
#include "os/residency.h"
#include "os/status.h"
#include "store/ahead.h"
#include "store/grains.h"

#include <errno.h>
#include <stdlib.h>

/* Look-ups and copies with the lock held at a stretch. */
enum { LOOKS = 4096, COPIES = 256 };

/* A copy from RAM takes no longer than this, in ns, and one more for each byte. */
#define FROM_RAM ((uint64_t)20000)

/* How many places are looked at before a batch is asked for: an answer of the kernel takes 400 ns, a view 150. */
enum { FEW = 4, A_LOOK_FOR = 64, MOST_LOOKS = 64 };

typedef struct {
    ndm_reader *reader;
    const int64_t *slots;
    const int64_t *generations; /* NULL: any */
    uint64_t count;
    ndm_value *values;    /* as they were found */
    ndm_i_wanted *places; /* of those that are not empty; the tag is the number of the value */
    uint64_t place_count;
    uint64_t bytes;
} many;

static int64_t generation_at(const many *all, uint64_t i) { return all->generations ? all->generations[i] : -1; }

/* ---- looking up ----------------------------------------------------------------------------------------- */

/* A torn table may tell any size, and the caller makes room for it. */
static int check_end(const ndm_reader *reader, const ndm_value *value, uint64_t *length)
{
    const uint64_t end = value->offset + value->size;
    if (end > *length)
        *length = ndm_i_file_size(&reader->data); /* it may have grown */
    return end <= *length ? NDM_OK : ndm_i_fail_io(EIO, "the file is shorter than its table says");
}

/* Look up some values, from `*done` on, with the lock held. */
static int find_some(many *all, uint64_t *done)
{
    ndm_reader *reader = all->reader;
    const uint64_t end = ndm_i_min(all->count, *done + LOOKS);
    uint64_t length = 0;
    int status = ndm_i_reader_enter(reader);
    if (status != NDM_OK)
        return status;
    for (; *done < end && status == NDM_OK; *done += status == NDM_OK) {
        ndm_value *value = &all->values[*done];
        status = ndm_i_reader_look_up(reader, all->slots[*done], generation_at(all, *done), value);
        if (status == NDM_OK && value->size > 0)
            status = check_end(reader, value, &length);
    }
    pthread_mutex_unlock(&reader->lock);
    return status;
}

static int find_all(many *all)
{
    uint64_t i = 0;
    int status;
    do {
        status = find_some(all, &i);
        if (status == NDM_ERR_WAIT) { /* this one is being moved */
            status = ndm_reader_find(all->reader, all->slots[i], generation_at(all, i), &all->values[i]);
            i += status == NDM_OK;
        }
        if (status != NDM_OK && i < all->count)
            return (int)ndm_i_of_slot(all->slots[i], status);
    } while (i < all->count && status == NDM_OK);
    return status;
}

/* Where the values lie, in the order of the batch, and how much they are. */
static int list_places(many *all)
{
    all->place_count = all->bytes = 0;
    for (uint64_t i = 0; i < all->count; i++) {
        const ndm_value *value = &all->values[i];
        if (value->size > 0)
            all->places[all->place_count++] = (ndm_i_wanted){.offset = value->offset, .size = value->size, .tag = i};
        all->bytes += value->size;
        if (all->bytes > INT64_MAX)
            return ndm_i_fail(NDM_ERR_ARGUMENT, "the values together are larger than any buffer");
    }
    return NDM_OK;
}

static int begin(many *all)
{
    all->values = malloc((all->count + 1) * sizeof *all->values);
    all->places = malloc((all->count + 1) * sizeof *all->places);
    return all->values && all->places ? NDM_OK : ndm_i_fail(NDM_ERR_MEMORY, "no memory for a batch");
}

static void end(many *all)
{
    free(all->values);
    free(all->places);
}

/* ---- asking --------------------------------------------------------------------------------------------- */

/* Is some of the places from `from` on missing from RAM? A few are looked at, with the lock held. */
static bool looks_cold(const many *all, uint64_t from)
{
    const uint64_t count = all->place_count - from;
    const uint64_t looks = count < FEW ? 0 : ndm_i_min(count / A_LOOK_FOR + 1, MOST_LOOKS);
    bool cold = false;
    for (uint64_t i = 0; i < looks && !cold; i++) {
        const ndm_i_wanted *place = &all->places[from + count / looks * i];
        cold = ndm_i_is_missing(&all->reader->data, place->offset, place->offset + place->size);
    }
    return cold;
}

/* Ask for places in file order, with the lock held. Where the file does not reach so far, the copies find that out. */
static void ask(ndm_reader *reader, const ndm_i_wanted *places, uint64_t count)
{
    ndm_value last = {0};
    for (uint64_t i = 0; i < count; i++)
        last.offset = ndm_i_max(last.offset, places[i].offset + places[i].size);
    if (count > 0 && ndm_i_reader_reach(reader, &last) == NDM_OK)
        ndm_i_ahead_ask(reader->values->base, places, count);
}

/* Ask for the next window; where it ends. */
static uint64_t ask_window(const many *all, uint64_t from)
{
    uint64_t held;
    const uint64_t to = ndm_i_ahead_window(all->places, all->place_count, from, NDM_I_AHEAD_GRAINS, &held);
    if (held > NDM_I_AHEAD_GRAINS || ndm_i_reader_enter(all->reader) != NDM_OK) /* one large value: read in one go */
        return to;
    ask(all->reader, all->places + from, to - from);
    pthread_mutex_unlock(&all->reader->lock);
    return to;
}

/* ---- copying -------------------------------------------------------------------------------------------- */

/* A batch of copies: where each value goes. */
typedef struct {
    many all;
    uint8_t *buffer;
    uint64_t *starts; /* in the buffer */
} copies;

/* Copy a value, with the lock held. NDM_ERR_WAIT: it is not what was looked up any more. */
static int load(ndm_reader *reader, const ndm_value *value, uint8_t *target)
{
    reader->moment = ndm_i_now(); /* a batch takes long */
    const int status = ndm_i_reader_load(reader, value, (char *)target);
    if (ndm_i_reader_is_unchanged(reader, value))
        return status;
    const int gone = ndm_i_reader_check(reader);
    return gone != NDM_OK ? gone : ndm_i_fail(NDM_ERR_WAIT, "the value keeps changing");
}

/* Copy a value that was moved, by itself. Where the slot may hold any value, another one changes the whole batch. */
static int load_again(const copies *copy, uint64_t i)
{
    const ndm_value *value = &copy->all.values[i];
    const int64_t size = ndm_reader_copy(copy->all.reader, value->slot, value->generation,
                                         copy->buffer + copy->starts[i], value->size);
    if (size == (int64_t)value->size)
        return NDM_OK;
    if (size >= 0 || (size == NDM_ERR_STALE && generation_at(&copy->all, i) < 0))
        return ndm_i_fail(NDM_ERR_WAIT, "the values keep changing");
    return (int)ndm_i_of_slot(value->slot, size);
}

/* Copy the places [*from, to), with the lock held for some at a time; up to one that was slow, if `warm`. */
static int load_places(const copies *copy, uint64_t *from, uint64_t to, bool *warm)
{
    ndm_reader *reader = copy->all.reader;
    int status = NDM_OK;
    bool slow = false;
    while (*from < to && status == NDM_OK && !slow) {
        const uint64_t end = ndm_i_min(to, *from + COPIES);
        if ((status = ndm_i_reader_enter(reader)) != NDM_OK)
            return status;
        uint64_t before = reader->moment, i = 0;
        while (*from < end && !slow) {
            i = copy->all.places[*from].tag;
            const ndm_value *value = &copy->all.values[i];
            if ((status = load(reader, value, copy->buffer + copy->starts[i])) != NDM_OK)
                break;
            ++*from;
            if (*warm) {
                const uint64_t now = ndm_i_now(), took = now - before;
                slow = took > FROM_RAM + value->size && looks_cold(&copy->all, *from);
                before = took > FROM_RAM + value->size ? ndm_i_now() : now;
            }
        }
        pthread_mutex_unlock(&reader->lock);
        if (status == NDM_ERR_WAIT && (status = load_again(copy, i)) == NDM_OK)
            ++*from;
    }
    *warm = *warm && !slow;
    return status;
}

static int load_all(copies *copy)
{
    const uint64_t count = copy->all.place_count;
    uint64_t done = 0, asked;
    bool warm = true;
    int status = load_places(copy, &done, count, &warm);
    ndm_i_ahead_sort(copy->all.places + done, count - done);
    for (asked = done; done < count && status == NDM_OK;) {
        const uint64_t next = asked < count ? ask_window(&copy->all, asked) : count;
        status = load_places(copy, &done, asked, &warm);
        asked = next;
    }
    return status;
}

/* Where each value goes. */
static void lay_out(copies *copy)
{
    uint64_t at = 0;
    for (uint64_t i = 0; i < copy->all.count; i++) {
        copy->starts[i] = at;
        at += copy->all.values[i].size;
    }
}

static int64_t load_once(copies *copy, uint64_t capacity)
{
    int status = find_all(&copy->all);
    if (status == NDM_OK)
        status = list_places(&copy->all);
    if (status != NDM_OK)
        return status;
    if (copy->all.bytes > capacity)
        return (int64_t)copy->all.bytes;
    lay_out(copy);
    status = load_all(copy);
    return status == NDM_OK ? (int64_t)copy->all.bytes : status;
}

int64_t ndm_reader_load_many(ndm_reader *reader, const int64_t *slots, const int64_t *generations, uint64_t count,
                             void *buffer, uint64_t capacity, int64_t *lengths)
{
    copies copy = {.all = {.reader = reader, .slots = slots, .generations = generations, .count = count},
                    .buffer = buffer};
    ndm_i_patience patience = {0};
    int64_t status = begin(&copy.all);
    if (status == NDM_OK && !(copy.starts = malloc((count + 1) * sizeof *copy.starts)))
        status = ndm_i_fail(NDM_ERR_MEMORY, "no memory for a batch");
    if (status == NDM_OK)
        while ((status = load_once(&copy, capacity)) == NDM_ERR_WAIT && ndm_i_pause(&patience))
            ;
    if (status >= 0 && (uint64_t)status <= capacity)
        for (uint64_t i = 0; i < count; i++)
            lengths[i] = (int64_t)copy.all.values[i].size;
    free(copy.starts);
    end(&copy.all);
    return status;
}

/* ---- views ---------------------------------------------------------------------------------------------- */

/* Ask for all that is about to be viewed, if some of it is missing. */
static int ask_all(many *all)
{
    const int status = ndm_i_reader_enter(all->reader);
    if (status != NDM_OK)
        return status;
    const bool cold = looks_cold(all, 0);
    pthread_mutex_unlock(&all->reader->lock);
    if (cold)
        ndm_i_ahead_sort(all->places, all->place_count);
    for (uint64_t from = 0; cold && from < all->place_count;)
        from = ask_window(all, from);
    return NDM_OK;
}

/* View some values, from `*done` on, where they are now. */
static int view_some(many *all, const char **views, uint64_t *done)
{
    ndm_reader *reader = all->reader;
    const uint64_t end = ndm_i_min(all->count, *done + COPIES);
    int status = ndm_i_reader_enter(reader);
    if (status != NDM_OK)
        return status;
    for (; *done < end && status == NDM_OK; *done += status == NDM_OK) {
        ndm_value *value = &all->values[*done];
        status = ndm_i_reader_look_up(reader, all->slots[*done], generation_at(all, *done), value);
        if (status == NDM_OK && !(views[*done] = ndm_i_reader_view(reader, value)))
            status = ndm_last_error()->status;
    }
    pthread_mutex_unlock(&reader->lock);
    return status;
}

static int view_all(many *all, const char **views)
{
    uint64_t done = 0;
    int status = NDM_OK;
    while (done < all->count && status == NDM_OK) {
        status = view_some(all, views, &done);
        if (status == NDM_ERR_WAIT) { /* this one is being moved */
            views[done] = ndm_reader_read(all->reader, all->slots[done], generation_at(all, done), &all->values[done]);
            status = views[done] ? NDM_OK : ndm_last_error()->status;
            done += status == NDM_OK;
        }
    }
    if (status != NDM_OK) {
        status = done < all->count ? (int)ndm_i_of_slot(all->slots[done], status) : status;
        while (done-- > 0)
            ndm_view_release(views[done]);
    }
    return status;
}

int ndm_reader_read_many(ndm_reader *reader, const int64_t *slots, const int64_t *generations, uint64_t count,
                         const char **views, uint64_t *sizes)
{
    many all = {.reader = reader, .slots = slots, .generations = generations, .count = count};
    int status = begin(&all);
    if (status == NDM_OK)
        status = find_all(&all);
    if (status == NDM_OK)
        status = list_places(&all);
    if (status == NDM_OK)
        status = ask_all(&all);
    if (status == NDM_OK)
        status = view_all(&all, views);
    for (uint64_t i = 0; status == NDM_OK && i < count; i++)
        sizes[i] = all.values[i].size;
    end(&all);
    return status;
}
