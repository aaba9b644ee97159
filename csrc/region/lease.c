/* A reader's leases: a value is kept where it is, by an entry in the leases file. */
#define _GNU_SOURCE
#include "region/lookup.h"

#include "os/owner.h"
#include "os/patience.h"
#include "os/status.h"

#include <errno.h>
#include <stdlib.h>

/* How often a value that moves while it is leased is leased again. */
enum { RETRIES = 1000 };

static bool is_same(const ndm_i_file *one, const ndm_i_file *other)
{
    return one->inode == other->inode && one->born == other->born;
}

/* Does the path of the data file lead to another file by now? */
static int check_path(const ndm_reader *reader)
{
    ndm_i_file there;
    ndm_i_fork_bar(); /* no child finds the file listed */
    int status = ndm_i_file_open_to_read(&there, reader->data_path);
    if (status != NDM_OK && ndm_last_error()->os_errno == ENOENT)
        status = NDM_OK; /* gone, but nobody's */
    else if (status == NDM_OK && !is_same(&there, &reader->data))
        status = ndm_i_fail(NDM_ERR_STALE, "the path leads to another region's files by now");
    ndm_i_file_close(&there, NULL);
    ndm_i_fork_let();
    return status;
}

/* Open the leases file. It is found by its path: if other files stand there by now, our owner does not look into it. */
static int join_leases(ndm_reader *reader)
{
    int status = ndm_i_leases_join(&reader->leases, reader->leases_path, false);
    if (status != NDM_OK)
        return status;
    reader->leases.incarnation = reader->incarnation;
    if (is_same(&reader->leases.file, &reader->data) || is_same(&reader->leases.file, &reader->slots)) {
        ndm_i_leases_close(&reader->leases); /* a value's bytes may look like leases */
        return (int)ndm_i_of_file(NDM_FILE_LEASES, ndm_i_fail_io(EINVAL, "the file is not a leases file"));
    }
    if ((status = check_path(reader)) != NDM_OK)
        ndm_i_leases_close(&reader->leases);
    return status;
}

/* Claim a lease of a value with the place where it is. What is found afterwards counts: only then the owner is sure to
 * see the lease. An entry that names another place than that would not keep the value past the owner's death. */
static int64_t claim_in_place(ndm_reader *reader, int64_t slot, int64_t generation, ndm_value *out)
{
    for (int tries = 0; tries < RETRIES; tries++) {
        ndm_value before;
        int status = ndm_i_reader_look_up(reader, slot, generation, &before);
        if (status != NDM_OK)
            return status;
        const ndm_i_span place = {before.offset, before.size};
        const int64_t entry = ndm_i_leases_claim(&reader->leases, (uint32_t)slot, before.generation, place);
        if (entry < 0)
            return entry;
        status = ndm_i_reader_look_up(reader, slot, before.generation, out);
        if (status == NDM_OK)
            status = ndm_i_reader_check(reader);
        if (status == NDM_OK && out->place == before.place && out->turns == before.turns)
            return entry;
        ndm_i_leases_release(&reader->leases, (uint64_t)entry);
        if (status != NDM_OK)
            return status;
    }
    return ndm_i_fail(NDM_ERR_STALE, "the value keeps moving");
}

static int64_t lease_once(ndm_reader *reader, int64_t slot, int64_t generation, const char **view, ndm_value *out)
{
    ndm_value value;
    int64_t status = ndm_i_reader_enter(reader);
    if (status != NDM_OK)
        return status;
    if (!ndm_i_leases_are_open(&reader->leases))
        status = join_leases(reader);
    const int64_t entry = status == NDM_OK ? claim_in_place(reader, slot, generation, &value) : status;
    const char *address = entry >= 0 ? ndm_i_reader_fetch_view(reader, &value) : NULL;
    if (address) {
        *view = address;
        *out = value;
        status = entry;
    } else {
        status = ndm_last_error()->status;
        if (entry >= 0)
            ndm_i_leases_release(&reader->leases, (uint64_t)entry);
    }
    pthread_mutex_unlock(&reader->lock);
    return status;
}

int64_t ndm_reader_lease(ndm_reader *reader, int64_t slot, int64_t generation, const char **view, ndm_value *out)
{
    const ndm_error before = *ndm_last_error();
    ndm_i_patience patience = {0};
    int64_t status;
    while ((status = lease_once(reader, slot, generation, view, out)) == NDM_ERR_WAIT && ndm_i_pause(&patience))
        ;
    return ndm_i_ended(status, &before);
}

int ndm_reader_release(ndm_reader *reader, int64_t lease)
{
    if (!reader)
        return NDM_OK;
    if (!ndm_i_is_process(reader->process))
        return ndm_i_fail(NDM_ERR_WRONG_THREAD, "the reader belongs to the process that opened it");
    pthread_mutex_lock(&reader->lock);
    if (lease >= 0 && lease < NDM_I_LEASES && ndm_i_leases_are_open(&reader->leases)) /* else it went with the files */
        ndm_i_leases_release(&reader->leases, (uint64_t)lease);
    pthread_mutex_unlock(&reader->lock);
    return NDM_OK;
}

int64_t ndm_reader_leases(ndm_reader *reader, ndm_leased *places, uint64_t capacity)
{
    const ndm_error before = *ndm_last_error();
    int64_t status = ndm_i_reader_enter(reader);
    if (status != NDM_OK)
        return status;
    ndm_i_span *found = malloc(NDM_I_LEASES * sizeof *found);
    status = found ? ndm_i_leases_look(reader->leases_path, found)
                   : ndm_i_fail(NDM_ERR_MEMORY, "no memory to look at the leases");
    for (int64_t i = 0; i < status && (uint64_t)i < capacity; i++)
        places[i] = (ndm_leased){found[i].offset, found[i].size};
    free(found);
    pthread_mutex_unlock(&reader->lock);
    return ndm_i_ended(status, &before);
}
