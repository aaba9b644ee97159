/* See leases.h. */
#define _GNU_SOURCE
#include "store/leases.h"

#include "os/bits.h"
#include "os/owner.h"
#include "os/status.h"

#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <time.h>

static const char magic[8] = {'N', 'D', 'M', 'L', 'E', 'A', 'S', 'E'};
enum { VERSION = 3 };

/* The magic, then the version, are the same in every version but the first, which had no version and another size. */
typedef struct {
    char magic[8];
    uint64_t version;
    uint64_t released; /* another number after each release */
    uint64_t unused;
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

/* Empty an entry that is claimed here. Where the disk refuses, it says nothing all the same. */
static void vacate(const ndm_i_file *file, uint64_t entry)
{
    static const uint64_t none = 0;
    ndm_i_file_write(file, (const uint8_t *)&none, sizeof none, place_in_file(entry) + offsetof(lease, key));
}

/* A number that no two releases have in common: the owner looks for a change. Readers cannot count together without a
 * mapping, and need not. */
static uint64_t moment(void)
{
    struct timespec now = {0};
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
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
    header whole = {.version = VERSION, .released = moment()};
    memcpy(whole.magic, magic, sizeof magic);
    const uint64_t length = ndm_i_min(ndm_i_file_size(file), FILE_SIZE);
    int refused = ndm_i_file_write(file, NULL, FILE_SIZE - length, length);
    if (!refused)
        refused = ndm_i_file_allocate(file, 0, FILE_SIZE);
    if (!refused)
        refused = ndm_i_file_write(file, (const uint8_t *)&whole, sizeof whole, 0);
    if (refused)
        return ndm_i_fail_io(refused, "cannot get room for the leases");
    leases->seen = whole.released;
    return NDM_OK;
}

static int in_leases(int64_t status) { return (int)ndm_i_of_file(NDM_FILE_LEASES, status); }

static int start(ndm_i_leases *leases, const char *path)
{
    *leases = (ndm_i_leases){.file.fd = -1};
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
    *leases = (ndm_i_leases){.file.fd = -1};
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
    if (sound)
        return NDM_OK;
    const int status = complete(leases);
    leases->seen = 0; /* a release may have been reported to what is gone */
    return in_leases(status);
}

void ndm_i_leases_close(ndm_i_leases *leases)
{
    if (!ndm_i_leases_are_open(leases))
        return;
    const bool ours = ndm_i_is_process(leases->file.process); /* a child has claimed nothing */
    for (uint64_t entry = 0; ours && entry < NDM_I_LEASES; entry++)
        ndm_i_leases_release(leases, entry);
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

/* Claim one of AT_ONCE entries; of those that are empty, or of all. Its number, -1 if there is none, or a status. */
static int64_t claim_one(ndm_i_leases *leases, uint64_t first, bool any, const lease *wanted)
{
    lease entries[AT_ONCE];
    if (!load(&leases->file, first, AT_ONCE, entries))
        return ndm_i_fail_io(errno, "cannot read the leases");
    for (uint64_t i = 0; i < AT_ONCE; i++)
        if ((entries[i].key == 0 || any) && ndm_i_claims_take(&leases->claims, first + i))
            return fill(leases, first + i, wanted);
    return -1;
}

_Static_assert(NDM_ERR_IO != -1, "told from no entry");

int64_t ndm_i_leases_claim(ndm_i_leases *leases, uint32_t slot, uint32_t generation, ndm_i_span place)
{
    const lease wanted = {packed(slot, generation), leases->incarnation, place.offset, place.size};
    /* The entry that this reader used last is free more often than not. */
    int64_t entry =
        ndm_i_claims_take(&leases->claims, leases->latest) ? fill(leases, leases->latest, &wanted) : -1;
    for (int round = 0; round < 2 && entry == -1; round++) /* first those that are empty, then those that say nothing */
        for (uint64_t first = 0; first < NDM_I_LEASES && entry == -1; first += AT_ONCE)
            entry = claim_one(leases, first, round > 0, &wanted);
    if (entry == -1)
        entry = ndm_i_fail_io(EAGAIN, "all leases are taken");
    return entry < 0 ? in_leases(entry) : entry;
}

/* The claim is the lease: what the entry says is nothing from now on. */
void ndm_i_leases_release(ndm_i_leases *leases, uint64_t entry)
{
    if (!ndm_i_claims_is_mine(&leases->claims, entry))
        return;
    ndm_i_claims_drop(&leases->claims, entry);
    const uint64_t now = moment(); /* after that: an owner that sees it finds the entry claimed by nobody */
    ndm_i_file_write(&leases->file, (const uint8_t *)&now, sizeof now, offsetof(header, released));
}

/* ---- the owner ------------------------------------------------------------------------------------------ */

bool ndm_i_leases_any_held(const ndm_i_leases *leases)
{
    uint64_t first = 0, end = NDM_I_LEASES;
    return ndm_i_claims_find_held(&leases->file, &first, &end);
}

/* What is looked for among the entries. */
typedef struct {
    const ndm_i_file *file;
    bool (*is_wanted)(const lease *, const void *);
    const void *wanted;
    int questions; /* that the kernel is asked yet, before all entries are read */
} search;

/* Among the entries of [first, end), which are `claimed`, or may be? Yes, too, where the system cannot read them. */
static bool is_among(const search *looking, uint64_t first, uint64_t end, bool claimed)
{
    lease entries[AT_ONCE];
    for (uint64_t count; first < end; first += count) {
        count = ndm_i_min(end - first, AT_ONCE);
        if (!load(looking->file, first, count, entries))
            return true;
        for (uint64_t i = 0; i < count; i++)
            if (looking->is_wanted(&entries[i], looking->wanted) &&
                (claimed || ndm_i_claims_is_held(looking->file, first + i)))
                return true;
    }
    return false;
}

/* Is there such an entry that a living process claims? The kernel tells claims in a row, in any order. Few are the rule. */
static bool find(search *looking, uint64_t first, uint64_t end)
{
    uint64_t claimed = first, free = end;
    if (first >= end)
        return false;
    if (looking->questions-- <= 0)
        return is_among(looking, first, end, false);
    if (!ndm_i_claims_find_held(looking->file, &claimed, &free))
        return false;
    return is_among(looking, claimed, free, true) || find(looking, first, claimed) || find(looking, free, end);
}

static bool has(const ndm_i_leases *leases, bool (*is_wanted)(const lease *, const void *), const void *wanted)
{
    search looking = {.file = &leases->file, .is_wanted = is_wanted, .wanted = wanted, .questions = 12};
    return ndm_i_leases_are_open(leases) && find(&looking, 0, NDM_I_LEASES);
}

static bool is_of_value(const lease *entry, const void *wanted)
{
    const lease *value = wanted;
    return entry->key == value->key && entry->incarnation == value->incarnation;
}

bool ndm_i_leases_has(const ndm_i_leases *leases, uint32_t slot, uint32_t generation)
{
    const lease value = {.key = packed(slot, generation), .incarnation = leases->incarnation};
    return has(leases, is_of_value, &value);
}

static bool is_touching(const lease *entry, const void *wanted)
{
    const ndm_i_span *bytes = wanted;
    if (entry->key == 0 || entry->size == 0)
        return false;
    return entry->offset > bytes->offset ? entry->offset - bytes->offset < bytes->size
                                         : bytes->offset - entry->offset < entry->size;
}

bool ndm_i_leases_touch(const ndm_i_leases *leases, ndm_i_span bytes) { return has(leases, is_touching, &bytes); }

/* The places in the entries that living processes claim. How many, or a status. */
static int64_t places_in(const ndm_i_file *file, ndm_i_span *places)
{
    lease entries[AT_ONCE];
    int64_t count = 0;
    for (uint64_t first = 0; first < NDM_I_LEASES; first += AT_ONCE) {
        if (!load(file, first, AT_ONCE, entries))
            return ndm_i_fail_io(errno, "cannot read the leases");
        for (uint64_t i = 0; i < AT_ONCE; i++) {
            if (entries[i].key == 0 || !ndm_i_claims_is_held(file, first + i))
                continue;
            if (places)
                places[count] = (ndm_i_span){entries[i].offset, entries[i].size};
            count++;
        }
    }
    return count;
}

int64_t ndm_i_leases_places(const ndm_i_leases *leases, ndm_i_span *places)
{
    if (!ndm_i_leases_any(leases))
        return 0;
    const int64_t count = places_in(&leases->file, places);
    return count < 0 ? in_leases(count) : count;
}

void ndm_i_leases_reap(ndm_i_leases *leases)
{
    lease entries[AT_ONCE];
    for (uint64_t first = 0; ndm_i_leases_are_open(leases) && first < NDM_I_LEASES; first += AT_ONCE) {
        if (!load(&leases->file, first, AT_ONCE, entries))
            return;
        for (uint64_t i = 0; i < AT_ONCE; i++) {
            if (entries[i].key == 0 || !ndm_i_claims_take(&leases->claims, first + i))
                continue;
            vacate(&leases->file, first + i);
            ndm_i_claims_drop(&leases->claims, first + i);
        }
    }
}

bool ndm_i_leases_news(ndm_i_leases *leases)
{
    uint64_t released = 0;
    if (!ndm_i_leases_are_open(leases) ||
        ndm_i_file_load_some(&leases->file, offsetof(header, released), &released, sizeof released) < 0)
        return false;
    const bool news = released != leases->seen;
    leases->seen = released;
    return news;
}

/* ---- anybody -------------------------------------------------------------------------------------------- */

int64_t ndm_i_leases_look(const char *path, ndm_i_span *places)
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
