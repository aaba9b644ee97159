/* See leases.h. */
#define _GNU_SOURCE
#include "store/leases.h"

#include "os/bits.h"
#include "os/bytes.h"
#include "os/fork.h"
#include "os/owner.h"
#include "os/status.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

static const char magic[8] = {'N', 'D', 'M', 'L', 'E', 'A', 'S', 'E'};
enum { VERSION = 3 };

/* The magic, then the version, are the same in every version but the first, which had no version and another size. */
typedef struct {
    char magic[8];
    uint64_t version;
    uint64_t unused[2];
} header;

typedef struct {
    uint64_t key; /* slot + 1 (32 bits), generation (32); 0: free */
    uint64_t incarnation, offset, size;
} lease;

enum { AT_ONCE = 250 }; /* entries that are read in one go */
#define FILE_SIZE (sizeof(header) + NDM_I_LEASES * sizeof(lease))

_Static_assert((int)NDM_I_LEASES <= (int)NDM_I_MOST_CLAIMS, "an entry is a claim");
_Static_assert((int)NDM_I_LEASES % (int)AT_ONCE == 0, "whole reads");
_Static_assert(sizeof(lease) == 32 && sizeof(header) == 32, "the file's layout");

static uint64_t packed(uint32_t slot, uint32_t generation) { return ((uint64_t)slot + 1) | (uint64_t)generation << 32; }

/* ---- entries in the file -------------------------------------------------------------------------------- */

static uint64_t place_in_file(uint64_t entry) { return sizeof(header) + entry * sizeof(lease); }

/* Read up to AT_ONCE entries; those that the file is too short for are empty. false: the system cannot read them. */
static bool load(const ndm_i_file *file, uint64_t first, uint64_t count, lease *entries)
{
    memset(entries, 0, count * sizeof *entries);
    return ndm_i_file_load_some(file, place_in_file(first), entries, count * sizeof *entries) >= 0;
}

/* 0 or errno. */
static int store(const ndm_i_file *file, uint64_t entry, const lease *content)
{
    return ndm_i_file_write(file, (const uint8_t *)content, sizeof *content, place_in_file(entry));
}

/* ---- walking through the claims ------------------------------------------------------------------------- */

/* What is done with the entries of [first, first + count): all are claimed by living processes, or that has not been asked. */
typedef void visitor(void *context, uint64_t first, const lease *entries, uint64_t count, bool claimed);

typedef struct {
    const ndm_i_file *file;
    visitor *visit;
    void *context;
    int questions; /* that the kernel is asked yet; after that all entries are visited, asked or not */
} walk;

/* false, with errno: the system cannot read the entries. */
static bool visit_entries(const walk *walking, uint64_t first, uint64_t end, bool claimed)
{
    lease entries[AT_ONCE];
    for (uint64_t count; first < end; first += count) {
        count = ndm_i_min(end - first, AT_ONCE);
        if (!load(walking->file, first, count, entries))
            return false;
        walking->visit(walking->context, first, entries, count, claimed);
    }
    return true;
}

/* Visit what living processes claim among [first, end). The kernel tells claims in a row, in any order; few rows are the
 * rule. One question where nothing is claimed. */
static bool visit_claims(walk *walking, uint64_t first, uint64_t end)
{
    uint64_t claimed = first, free = end;
    if (first >= end)
        return true;
    if (--walking->questions < 0)
        return visit_entries(walking, first, end, false);
    if (!ndm_i_claims_find_held(walking->file, &claimed, &free))
        return true;
    return visit_entries(walking, claimed, free, true) && visit_claims(walking, first, claimed) &&
           visit_claims(walking, free, end);
}

static bool visit_all(const ndm_i_file *file, visitor *visit, void *context)
{
    walk walking = {.file = file, .visit = visit, .context = context, .questions = 12};
    return visit_claims(&walking, 0, NDM_I_LEASES);
}

/* ---- opening -------------------------------------------------------------------------------------------- */

enum { NONE, FOREIGN, OTHER_VERSION, OURS };

/* What the open file holds. One that was shortened is ours while its version is there, and none if no more than the mark is:
 * what it said is lost. */
static int recognise(const ndm_i_file *file)
{
    struct {
        char magic[8];
        uint64_t version;
    } found = {.version = 0};
    if (file->capacity == 0)
        return NONE;
    if (file->capacity < sizeof magic ||
        ndm_i_file_load_some(file, 0, &found, ndm_i_min(file->capacity, sizeof found)) < (int64_t)sizeof magic)
        return FOREIGN;
    if (memcmp(found.magic, magic, sizeof magic) == 0)
        return found.version == VERSION ? OURS : file->capacity < sizeof found ? NONE : OTHER_VERSION;
    const bool unfinished = memcmp(found.magic, "\0\0\0\0\0\0\0", sizeof magic) == 0;
    return unfinished && file->capacity == FILE_SIZE ? NONE : FOREIGN;
}

/* Readers of another version may still store to the file that stands there: it is left to them. */
static int open_to_start(ndm_i_file *file, const char *path, int *found)
{
    int status = ndm_i_file_open(file, path, true, NDM_I_LOCK_NONE);
    if (status != NDM_OK || (*found = recognise(file)) != OTHER_VERSION)
        return status;
    ndm_i_file_close(file, path);
    status = ndm_i_file_open(file, path, true, NDM_I_LOCK_NONE);
    if (status == NDM_OK)
        *found = recognise(file);
    return status;
}

/* Give the file its whole length, and blocks, so that no reader meets a full disk; then its mark. Entries stay. */
static int complete(ndm_i_leases *leases)
{
    ndm_i_file *file = &leases->file;
    header whole = {.version = VERSION};
    memcpy(whole.magic, magic, sizeof magic);
    const uint64_t length = ndm_i_min(ndm_i_file_size(file), FILE_SIZE);
    int refused = ndm_i_file_write(file, NULL, FILE_SIZE - length, length);
    if (!refused)
        refused = ndm_i_file_allocate(file, 0, FILE_SIZE);
    if (!refused)
        refused = ndm_i_file_write(file, (const uint8_t *)&whole, sizeof whole, 0);
    if (refused)
        return ndm_i_fail_io(refused, "cannot get room for the leases");
    return NDM_OK;
}

static int in_leases(int64_t status) { return (int)ndm_i_of_file(NDM_FILE_LEASES, status); }

static void begin(ndm_i_leases *leases)
{
    ndm_i_fork_bar(); /* all zeros would be descriptor 0 */
    *leases = (ndm_i_leases){.file.fd = -1};
    ndm_i_fork_let();
}

static int start(ndm_i_leases *leases, const char *path)
{
    begin(leases);
    int found = NONE;
    int status = path ? open_to_start(&leases->file, path, &found) : ndm_i_file_open_unnamed(&leases->file, NULL);
    if (status != NDM_OK)
        return status;
    status = found == NONE || found == OURS ? complete(leases)
                                            : ndm_i_fail_io(EEXIST, "path.leases exists but is not a leases file");
    if (status != NDM_OK)
        ndm_i_leases_close(leases);
    else
        ndm_i_claims_init(&leases->claims, &leases->file, NDM_I_LEASES);
    return status;
}

int ndm_i_leases_start(ndm_i_leases *leases, const char *path) { return in_leases(start(leases, path)); }

static int join(ndm_i_leases *leases, const char *path, bool as_owner)
{
    begin(leases);
    int status = as_owner ? ndm_i_file_open(&leases->file, path, false, NDM_I_LOCK_NONE)
                          : ndm_i_file_open_to_lease(&leases->file, path);
    if (status == NDM_ERR_IO)
        return ndm_i_fail_io(ndm_last_error()->os_errno, ndm_last_error()->os_errno == EPERM
                                                             ? "the leases file belongs to another user"
                                                             : "cannot open the leases file");
    if (status != NDM_OK)
        return status;
    const int found = recognise(&leases->file);
    if (found != OURS)
        status = ndm_i_fail_io(EINVAL, found == OTHER_VERSION ? "the leases file is of another version"
                                                              : "the file is not a leases file");
    else if (as_owner)
        status = complete(leases);
    if (status != NDM_OK)
        ndm_i_leases_close(leases);
    else
        ndm_i_claims_init(&leases->claims, &leases->file, NDM_I_LEASES);
    return status;
}

int ndm_i_leases_join(ndm_i_leases *leases, const char *path, bool as_owner)
{
    return in_leases(join(leases, path, as_owner));
}

int ndm_i_leases_mend(ndm_i_leases *leases)
{
    leases->file.capacity = ndm_i_file_size(&leases->file);
    const bool sound = leases->file.capacity >= FILE_SIZE && recognise(&leases->file) == OURS;
    return sound ? NDM_OK : in_leases(complete(leases));
}

void ndm_i_leases_close(ndm_i_leases *leases)
{
    if (!ndm_i_leases_are_open(leases))
        return;
    const bool ours = ndm_i_is_process(leases->file.process); /* a child has claimed nothing */
    for (uint64_t entry = 0; ours && entry < NDM_I_LEASES; entry++)
        ndm_i_leases_release(leases, entry);
    free(leases->note);
    leases->note = NULL;
    leases->noted = NDM_I_NOTHING;
    ndm_i_file_close(&leases->file, NULL);
}

/* ---- readers -------------------------------------------------------------------------------------------- */

/* Fill in an entry that has just been claimed. Its number, or a status. */
static int64_t fill(ndm_i_leases *leases, uint64_t entry, const lease *wanted)
{
    const int refused = store(&leases->file, entry, wanted);
    if (refused) {
        ndm_i_claims_drop(&leases->claims, entry);
        return ndm_i_fail_io(refused, "cannot write the lease");
    }
    atomic_thread_fence(memory_order_seq_cst);
    leases->latest = entry;
    return (int64_t)entry;
}

int64_t ndm_i_leases_claim(ndm_i_leases *leases, uint32_t slot, uint32_t generation, ndm_i_span place)
{
    const lease wanted = {packed(slot, generation), leases->incarnation, place.offset, place.size};
    /* The entry that this reader used last is free more often than not. If it is not, the search goes on behind it. */
    for (uint64_t tries = 0; tries < NDM_I_LEASES; tries++) {
        const uint64_t entry = (leases->latest + tries) % NDM_I_LEASES;
        if (ndm_i_claims_take(&leases->claims, entry)) {
            const int64_t status = fill(leases, entry, &wanted);
            return status < 0 ? in_leases(status) : status;
        }
    }
    return in_leases(ndm_i_fail_io(EAGAIN, "all leases are taken"));
}

/* The claim is the lease: what the entry says is nothing from now on. */
void ndm_i_leases_release(ndm_i_leases *leases, uint64_t entry)
{
    if (!ndm_i_claims_is_mine(&leases->claims, entry))
        return;
    ndm_i_claims_drop(&leases->claims, entry);
}

/* ---- the owner ------------------------------------------------------------------------------------------ */

bool ndm_i_leases_any(const ndm_i_leases *leases)
{
    uint64_t first = 0, end = NDM_I_LEASES;
    return ndm_i_leases_are_open(leases) && ndm_i_claims_find_held(&leases->file, &first, &end);
}

/* What was leased when the owner last looked round. The filter spares most questions the way through the entries: it has a
 * bit for each key that is there. */
enum { FILTER_BITS = 4096 };

struct ndm_i_lease_note {
    uint64_t count;
    uint64_t filter[FILTER_BITS / 64];
    lease entries[NDM_I_LEASES];
    uint16_t number[NDM_I_LEASES];
    bool claimed[NDM_I_LEASES]; /* false: has not been asked */
};

static uint64_t bit_of(uint64_t key) { return (key ^ key >> 32) % FILTER_BITS; }

static void note_entries(void *context, uint64_t first, const lease *entries, uint64_t count, bool claimed)
{
    struct ndm_i_lease_note *note = context;
    for (uint64_t i = 0; i < count; i++) {
        if (entries[i].key == 0)
            continue;
        const uint64_t bit = bit_of(entries[i].key);
        note->filter[bit / 64] |= (uint64_t)1 << bit % 64;
        note->entries[note->count] = entries[i];
        note->number[note->count] = (uint16_t)(first + i);
        note->claimed[note->count++] = claimed;
    }
}

void ndm_i_leases_look_round(ndm_i_leases *leases)
{
    leases->noted = NDM_I_NOTHING;
    if (!leases->note && !ndm_i_leases_any(leases))
        return;
    leases->noted = NDM_I_ANYTHING;
    if (!leases->note && !(leases->note = malloc(sizeof *leases->note)))
        return;
    leases->note->count = 0;
    memset(leases->note->filter, 0, sizeof leases->note->filter);
    if (visit_all(&leases->file, note_entries, leases->note))
        leases->noted = leases->note->count > 0 ? NDM_I_SOMETHING : NDM_I_NOTHING;
}

/* Is the noted entry a lease? */
static bool is_lease(ndm_i_leases *leases, uint64_t i)
{
    struct ndm_i_lease_note *note = leases->note;
    return note->claimed[i] || ndm_i_claims_is_held(&leases->file, note->number[i]);
}

bool ndm_i_leases_find_noted(ndm_i_leases *leases, uint32_t slot, uint32_t generation)
{
    const struct ndm_i_lease_note *note = leases->note;
    const uint64_t key = packed(slot, generation);
    if (leases->noted == NDM_I_ANYTHING)
        return true;
    if ((note->filter[bit_of(key) / 64] >> bit_of(key) % 64 & 1) == 0)
        return false;
    for (uint64_t i = 0; i < note->count; i++)
        if (note->entries[i].key == key && note->entries[i].incarnation == leases->incarnation && is_lease(leases, i))
            return true;
    return false;
}

static bool touches(const lease *entry, ndm_i_span bytes)
{
    if (entry->size == 0)
        return false;
    return entry->offset > bytes.offset ? entry->offset - bytes.offset < bytes.size
                                        : bytes.offset - entry->offset < entry->size;
}

bool ndm_i_leases_touched(ndm_i_leases *leases, ndm_i_span bytes)
{
    if (leases->noted != NDM_I_SOMETHING)
        return leases->noted == NDM_I_ANYTHING;
    for (uint64_t i = 0; i < leases->note->count; i++)
        if (touches(&leases->note->entries[i], bytes) && is_lease(leases, i))
            return true;
    return false;
}

/* The places in the entries that living processes claim. */
typedef struct {
    const ndm_i_file *file;
    ndm_i_span *places; /* or NULL */
    int64_t count;
} places_found;

static void add_places(void *context, uint64_t first, const lease *entries, uint64_t count, bool claimed)
{
    places_found *found = context;
    for (uint64_t i = 0; i < count; i++) {
        if (entries[i].key == 0 || !(claimed || ndm_i_claims_is_held(found->file, first + i)))
            continue;
        if (found->places)
            found->places[found->count] = (ndm_i_span){entries[i].offset, entries[i].size};
        found->count++;
    }
}

/* How many, or a status. */
static int64_t places_in(const ndm_i_file *file, ndm_i_span *places)
{
    places_found found = {.file = file, .places = places};
    if (!visit_all(file, add_places, &found))
        return ndm_i_fail_io(errno, "cannot read the leases");
    return found.count;
}

int64_t ndm_i_leases_places(const ndm_i_leases *leases, ndm_i_span *places)
{
    const int64_t count = ndm_i_leases_are_open(leases) ? places_in(&leases->file, places) : 0;
    return count < 0 ? in_leases(count) : count;
}

void ndm_i_leases_reap(ndm_i_leases *leases)
{
    static const uint64_t none = 0;
    lease entries[AT_ONCE];
    for (uint64_t first = 0; ndm_i_leases_are_open(leases) && first < NDM_I_LEASES; first += AT_ONCE) {
        if (!load(&leases->file, first, AT_ONCE, entries))
            return;
        for (uint64_t i = 0; i < AT_ONCE; i++) {
            if (entries[i].key == 0 || !ndm_i_claims_take(&leases->claims, first + i))
                continue;
            /* Where the disk refuses, the entry says nothing all the same. */
            ndm_i_file_write(&leases->file, (const uint8_t *)&none, sizeof none,
                             place_in_file(first + i) + offsetof(lease, key));
            ndm_i_claims_drop(&leases->claims, first + i);
        }
    }
}

/* ---- anybody -------------------------------------------------------------------------------------------- */

static int64_t look(const char *path, ndm_i_span *places)
{
    ndm_i_file file;
    int64_t count = ndm_i_file_open_to_read(&file, path);
    if (count != NDM_OK)
        return ndm_last_error()->os_errno == ENOENT ? 0 : in_leases(count);
    const int found = recognise(&file);
    if (found == OURS)
        count = places_in(&file, places);
    else if (found != NONE) /* NONE: it is being made */
        count = ndm_i_fail_io(EINVAL, "the leases file is of another version, or is not one");
    ndm_i_file_close(&file, NULL);
    return count < 0 ? in_leases(count) : count;
}

int64_t ndm_i_leases_look(const char *path, ndm_i_span *places)
{
    ndm_i_fork_bar(); /* no child finds the file listed */
    const int64_t count = look(path, places);
    ndm_i_fork_let();
    return count;
}
