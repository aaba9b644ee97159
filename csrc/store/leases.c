/* See leases.h. */
#define _GNU_SOURCE
#include "store/leases.h"

#include "os/owner.h"
#include "os/status.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

static const char magic[8] = {'N', 'D', 'M', 'L', 'E', 'A', 'S', 'E'};
enum { VERSION = 2 };

_Static_assert((int)NDM_I_LEASES <= (int)NDM_I_MOST_CLAIMS, "an entry is a claim");
_Static_assert(sizeof(ndm_i_lease) == 32 && offsetof(ndm_i_lease_table, entries) == 32, "the file's layout");

static uint64_t packed(uint32_t slot, uint32_t generation) { return ((uint64_t)slot + 1) | (uint64_t)generation << 32; }

/* Take an entry out, once. An entry counts among those held from before it is set until after it is gone. */
static void vacate(void *leases, uint64_t entry)
{
    ndm_i_lease_table *table = leases;
    if (atomic_exchange(&table->entries[entry].key, 0) == 0)
        return;
    atomic_fetch_sub(&table->held, 1);
    atomic_fetch_add(&table->released, 1);
}

/* ---- opening -------------------------------------------------------------------------------------------- */

enum { NONE, FOREIGN, OTHER_VERSION, OURS };

/* What the open file holds. */
static int recognise(const ndm_i_file *file)
{
    struct {
        char magic[8];
        uint64_t version;
    } found = {.version = 0};
    if (file->capacity == 0)
        return NONE;
    if (file->capacity < sizeof found || ndm_i_file_load(file, 0, &found, sizeof found) != NDM_OK)
        return FOREIGN;
    if (memcmp(found.magic, magic, sizeof magic) == 0)
        return found.version == VERSION && file->capacity == sizeof(ndm_i_lease_table) ? OURS : OTHER_VERSION;
    const bool unfinished = memcmp(found.magic, "\0\0\0\0\0\0\0", sizeof magic) == 0;
    return unfinished && file->capacity == sizeof(ndm_i_lease_table) ? NONE : FOREIGN;
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

/* The file is mapped. */
static void use_table(ndm_i_leases *leases)
{
    leases->table = (ndm_i_lease_table *)leases->file.mapping->base;
    ndm_i_claims_init(&leases->claims, &leases->file, NDM_I_LEASES);
}

static int in_leases(int64_t status) { return (int)ndm_i_of_file(NDM_FILE_LEASES, status); }

static int start(ndm_i_leases *leases, const char *path)
{
    *leases = (ndm_i_leases){.file.fd = -1};
    int found = NONE;
    int status = path ? open_to_start(&leases->file, path, &found) : ndm_i_file_open_unnamed(&leases->file, NULL);
    if (status != NDM_OK)
        return status;
    if (found != NONE && found != OURS) {
        status = ndm_i_fail_io(EEXIST, "path.leases exists but is not a leases file");
        goto fail;
    }
    status = ndm_i_file_start(&leases->file, sizeof(ndm_i_lease_table), sizeof(ndm_i_lease_table));
    if (status != NDM_OK)
        goto fail;
    int refused = ndm_i_file_allocate(&leases->file, 0, sizeof(ndm_i_lease_table));
    if (!refused && found == NONE)
        refused = ndm_i_file_write(&leases->file, NULL, sizeof(ndm_i_lease_table), 0);
    if (refused) {
        status = ndm_i_fail_io(refused, "cannot get room for the leases");
        goto fail;
    }
    use_table(leases);
    leases->table->version = VERSION;
    memcpy(leases->table->magic, magic, sizeof magic);
    /* Readers of an earlier opening may still release theirs meanwhile: each entry is taken out by itself. */
    for (uint64_t entry = 0; entry < NDM_I_LEASES && found == OURS; entry++)
        vacate(leases->table, entry);
    return NDM_OK;

fail:
    ndm_i_leases_close(leases);
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
    if (found != OURS) {
        status = ndm_i_fail_io(EINVAL, found == OTHER_VERSION ? "the leases file is of another version"
                                                              : "the file is not a leases file");
        goto fail;
    }
    status = ndm_i_file_start(&leases->file, sizeof(ndm_i_lease_table), sizeof(ndm_i_lease_table));
    if (status != NDM_OK)
        goto fail;
    const int refused = as_owner ? ndm_i_file_allocate(&leases->file, 0, sizeof(ndm_i_lease_table)) : 0;
    if (refused) { /* a copy may be sparse, and a store to a hole SIGBUS */
        status = ndm_i_fail_io(refused, "cannot get room for the leases");
        goto fail;
    }
    use_table(leases);
    return NDM_OK;

fail:
    ndm_i_leases_close(leases);
    return status;
}

int ndm_i_leases_join(ndm_i_leases *leases, const char *path, bool as_owner)
{
    return in_leases(join(leases, path, as_owner));
}

void ndm_i_leases_close(ndm_i_leases *leases)
{
    const bool ours = leases->table && ndm_i_is_process(leases->file.process); /* a child has claimed nothing */
    for (uint64_t entry = 0; ours && entry < NDM_I_LEASES; entry++)
        ndm_i_leases_release(leases, entry);
    if (leases->file.fd >= 0)
        ndm_i_file_close(&leases->file, NULL);
    leases->table = NULL;
}

/* ---- readers -------------------------------------------------------------------------------------------- */

/* Fill in an entry that is claimed. false: it is not free, after all. */
static bool fill(ndm_i_leases *leases, ndm_i_lease *entry, uint64_t key, ndm_i_span place)
{
    uint64_t free_entry = 0;
    atomic_store_explicit(&entry->incarnation, leases->incarnation, memory_order_relaxed);
    atomic_store_explicit(&entry->offset, place.offset, memory_order_relaxed);
    atomic_store_explicit(&entry->size, place.size, memory_order_relaxed);
    return atomic_compare_exchange_strong(&entry->key, &free_entry, key);
}

int64_t ndm_i_leases_claim(ndm_i_leases *leases, uint32_t slot, uint32_t generation, ndm_i_span place)
{
    ndm_i_lease_table *table = leases->table;
    atomic_fetch_add(&table->held, 1);
    for (int round = 0; round < 2; round++) {
        for (uint64_t entry = 0; entry < NDM_I_LEASES; entry++) {
            if (atomic_load(&table->entries[entry].key) != 0 || !ndm_i_claims_take(&leases->claims, entry))
                continue;
            if (fill(leases, &table->entries[entry], packed(slot, generation), place)) {
                atomic_thread_fence(memory_order_seq_cst);
                return (int64_t)entry;
            }
            ndm_i_claims_drop(&leases->claims, entry);
        }
        ndm_i_leases_reap(leases); /* the owner may not have come round to it */
    }
    atomic_fetch_sub(&table->held, 1);
    return in_leases(ndm_i_fail_io(EAGAIN, "all leases are taken"));
}

void ndm_i_leases_release(ndm_i_leases *leases, uint64_t entry)
{
    if (!ndm_i_claims_is_mine(&leases->claims, entry))
        return;
    vacate(leases->table, entry);
    ndm_i_claims_drop(&leases->claims, entry);
}

/* ---- the owner ------------------------------------------------------------------------------------------ */

static uint64_t key_of(const ndm_i_lease *entry) { return atomic_load(&entry->key); }

static ndm_i_span place_of(const ndm_i_lease *entry)
{
    return (ndm_i_span){atomic_load_explicit(&entry->offset, memory_order_relaxed),
                        atomic_load_explicit(&entry->size, memory_order_relaxed)};
}

bool ndm_i_leases_has(const ndm_i_leases *leases, uint32_t slot, uint32_t generation)
{
    if (!ndm_i_leases_any(leases))
        return false;
    const uint64_t key = packed(slot, generation);
    for (const ndm_i_lease *entry = leases->table->entries; entry < leases->table->entries + NDM_I_LEASES; entry++)
        if (key_of(entry) == key && atomic_load(&entry->incarnation) == leases->incarnation)
            return true;
    return false;
}

bool ndm_i_leases_touch(const ndm_i_leases *leases, ndm_i_span bytes)
{
    for (uint64_t i = 0; i < NDM_I_LEASES && leases->table; i++) {
        if (key_of(&leases->table->entries[i]) == 0)
            continue;
        const ndm_i_span place = place_of(&leases->table->entries[i]);
        if (place.size == 0)
            continue;
        if (place.offset > bytes.offset ? place.offset - bytes.offset < bytes.size
                                        : bytes.offset - place.offset < place.size)
            return true;
    }
    return false;
}

uint64_t ndm_i_leases_places(const ndm_i_leases *leases, ndm_i_span *places)
{
    uint64_t count = 0;
    for (uint64_t i = 0; i < NDM_I_LEASES && leases->table; i++)
        if (key_of(&leases->table->entries[i]) != 0)
            places[count++] = place_of(&leases->table->entries[i]);
    return count;
}

static bool is_used(void *table, uint64_t entry) { return key_of(&((ndm_i_lease_table *)table)->entries[entry]) != 0; }

void ndm_i_leases_reap(ndm_i_leases *leases)
{
    if (leases->table)
        ndm_i_claims_reap(&leases->claims, leases->table, is_used, vacate); /* vacate() bears an entry that is free by now */
}

bool ndm_i_leases_news(ndm_i_leases *leases)
{
    const uint64_t released = leases->table ? atomic_load(&leases->table->released) : leases->seen;
    const bool news = released != leases->seen;
    leases->seen = released;
    return news;
}

/* ---- anybody -------------------------------------------------------------------------------------------- */

/* The file is read, not mapped: who may not write to it cannot rely on its length. */
int64_t ndm_i_leases_look(const char *path, ndm_i_span *places)
{
    ndm_i_file file;
    int64_t count = ndm_i_file_open_to_read(&file, path);
    if (count != NDM_OK)
        return ndm_last_error()->os_errno == ENOENT ? 0 : in_leases(count);
    const int found = recognise(&file);
    ndm_i_lease_table *table = calloc(1, sizeof *table);
    if (!table)
        count = ndm_i_fail(NDM_ERR_MEMORY, "no memory to look at the leases");
    else if (found != OURS && found != NONE) /* NONE: it is being made */
        count = ndm_i_fail_io(EINVAL, "the leases file is of another version, or is not one");
    else if (found == OURS)
        count = ndm_i_file_load(&file, 0, table, sizeof *table);
    for (uint64_t i = 0; i < NDM_I_LEASES && count >= 0; i++) {
        if (key_of(&table->entries[i]) == 0 || !ndm_i_claims_is_held(&file, i))
            continue;
        if (places)
            places[count] = place_of(&table->entries[i]);
        count++;
    }
    free(table);
    ndm_i_file_close(&file, NULL);
    return count < 0 ? in_leases(count) : count;
}
