#define _GNU_SOURCE
#include "leases.h"

#include "status.h"

#include <errno.h>
#include <string.h>

static const char magic[8] = {'N', 'D', 'M', 'L', 'E', 'A', 'S', 'E'};

static bool is_mine(const ndm_i_leases *leases, uint64_t entry) { return leases->mine[entry / 64] >> entry % 64 & 1; }

static uint64_t packed(uint32_t slot, uint32_t generation) { return ((uint64_t)slot + 1) | (uint64_t)generation << 32; }

/* Take an entry out, once. An entry counts among those held from before it is set until after it is gone. */
static void vacate(ndm_i_lease_table *table, uint64_t entry)
{
    if (atomic_exchange(&table->entries[entry], 0) == 0)
        return;
    atomic_fetch_sub(&table->held, 1);
    atomic_fetch_add(&table->released, 1);
}

/* ---- opening -------------------------------------------------------------------------------------------- */

int ndm_i_leases_start(ndm_i_leases *leases, const char *path)
{
    *leases = (ndm_i_leases){.file.fd = -1};
    int status = path ? ndm_i_backing_open(&leases->file, path, true, NDM_I_LOCK_NONE)
                      : ndm_i_backing_open_unnamed(&leases->file, NULL);
    if (status != NDM_OK)
        return status;
    char found[sizeof magic] = {0};
    if (leases->file.capacity > 0 &&
        (leases->file.capacity != sizeof(ndm_i_lease_table) ||
         ndm_i_backing_load(&leases->file, 0, found, sizeof found) != NDM_OK ||
         (memcmp(found, magic, sizeof magic) != 0 && memcmp(found, "\0\0\0\0\0\0\0", sizeof magic) != 0))) {
        status = ndm_i_fail_io(EEXIST, "a file stands where the leases belong, and it is none");
        goto fail;
    }
    status = ndm_i_backing_start(&leases->file, sizeof(ndm_i_lease_table), sizeof(ndm_i_lease_table), true);
    if (status != NDM_OK)
        goto fail;
    /* Readers of an earlier opening may still release theirs meanwhile: each entry is taken out by itself. */
    const bool fresh = memcmp(found, magic, sizeof magic) != 0;
    int refused = ndm_i_backing_allocate(&leases->file, 0, sizeof(ndm_i_lease_table));
    if (!refused && fresh)
        refused = ndm_i_backing_write(&leases->file, NULL, sizeof(ndm_i_lease_table), 0);
    if (refused) {
        status = ndm_i_fail_io(refused, "cannot get room for the leases");
        goto fail;
    }
    leases->table = (ndm_i_lease_table *)leases->file.mapping->base;
    memcpy(leases->table->magic, magic, sizeof magic);
    for (uint64_t entry = 0; entry < NDM_I_LEASES && !fresh; entry++)
        vacate(leases->table, entry);
    return NDM_OK;

fail:
    ndm_i_leases_close(leases);
    return status;
}

int ndm_i_leases_join(ndm_i_leases *leases, const char *path)
{
    *leases = (ndm_i_leases){.file.fd = -1};
    int status = ndm_i_backing_open(&leases->file, path, false, NDM_I_LOCK_NONE);
    if (status == NDM_ERR_IO)
        return ndm_i_fail_io(ndm_last_error()->os_errno, "cannot open the leases file");
    if (status != NDM_OK)
        return status;
    if (leases->file.capacity != sizeof(ndm_i_lease_table)) {
        status = ndm_i_fail_io(EINVAL, "the leases file is none");
        goto fail;
    }
    status = ndm_i_backing_start(&leases->file, sizeof(ndm_i_lease_table), sizeof(ndm_i_lease_table), true);
    if (status != NDM_OK)
        goto fail;
    leases->table = (ndm_i_lease_table *)leases->file.mapping->base;
    if (memcmp(leases->table->magic, magic, sizeof magic) == 0)
        return NDM_OK;
    status = ndm_i_fail_io(EINVAL, "the leases file is none");

fail:
    ndm_i_leases_close(leases);
    return status;
}

void ndm_i_leases_close(ndm_i_leases *leases)
{
    for (uint64_t entry = 0; entry < NDM_I_LEASES && leases->table; entry++)
        ndm_i_leases_release(leases, entry);
    if (leases->file.fd >= 0)
        ndm_i_backing_close(&leases->file, NULL);
    leases->table = NULL;
}

/* ---- readers -------------------------------------------------------------------------------------------- */

int64_t ndm_i_leases_claim(ndm_i_leases *leases, uint32_t slot, uint32_t generation)
{
    ndm_i_lease_table *table = leases->table;
    atomic_fetch_add(&table->held, 1);
    for (int round = 0; round < 2; round++) {
        for (uint64_t entry = 0; entry < NDM_I_LEASES; entry++) {
            uint64_t free_entry = 0;
            if (is_mine(leases, entry) || atomic_load(&table->entries[entry]) != 0 ||
                !ndm_i_backing_lock_byte(&leases->file, entry, true))
                continue;
            if (atomic_compare_exchange_strong(&table->entries[entry], &free_entry, packed(slot, generation))) {
                atomic_thread_fence(memory_order_seq_cst);
                leases->mine[entry / 64] |= (uint64_t)1 << entry % 64;
                return (int64_t)entry;
            }
            ndm_i_backing_lock_byte(&leases->file, entry, false);
        }
        ndm_i_leases_reap(leases); /* the owner may not have come round to it */
    }
    atomic_fetch_sub(&table->held, 1);
    return ndm_i_fail_io(EAGAIN, "all leases are taken");
}

void ndm_i_leases_release(ndm_i_leases *leases, uint64_t entry)
{
    if (!is_mine(leases, entry))
        return;
    leases->mine[entry / 64] &= ~((uint64_t)1 << entry % 64);
    vacate(leases->table, entry);
    ndm_i_backing_lock_byte(&leases->file, entry, false);
}

/* ---- the owner ------------------------------------------------------------------------------------------ */

bool ndm_i_leases_has(const ndm_i_leases *leases, uint32_t slot, uint32_t generation)
{
    if (!leases->table || atomic_load(&leases->table->held) == 0)
        return false;
    for (uint64_t entry = 0; entry < NDM_I_LEASES; entry++)
        if (atomic_load(&leases->table->entries[entry]) == packed(slot, generation))
            return true;
    return false;
}

void ndm_i_leases_reap(ndm_i_leases *leases)
{
    if (!leases->table || atomic_load(&leases->table->held) == 0)
        return;
    for (uint64_t entry = 0; entry < NDM_I_LEASES; entry++) {
        if (is_mine(leases, entry) || atomic_load(&leases->table->entries[entry]) == 0 ||
            !ndm_i_backing_lock_byte(&leases->file, entry, true))
            continue;
        vacate(leases->table, entry); /* its holder may have released it just before the lock */
        ndm_i_backing_lock_byte(&leases->file, entry, false);
    }
}

bool ndm_i_leases_news(ndm_i_leases *leases)
{
    const uint64_t released = leases->table ? atomic_load(&leases->table->released) : leases->seen;
    const bool news = released != leases->seen;
    leases->seen = released;
    return news;
}

uint64_t ndm_i_leases_count(const ndm_i_leases *leases) { return leases->table ? atomic_load(&leases->table->held) : 0; }
