/* See kinship.h. */
#include "store/kinship.h"

#include "os/status.h"

#include <errno.h>

static void store(_Atomic uint64_t *word, uint64_t bits) { atomic_store_explicit(word, bits, memory_order_release); }

static ndm_i_identity noted(const _Atomic uint64_t *words)
{
    return (ndm_i_identity){{ndm_i_word(&words[0]), ndm_i_word(&words[1])}};
}

static void note(_Atomic uint64_t *words, ndm_i_identity identity)
{
    store(&words[0], identity.words[0]);
    store(&words[1], identity.words[1]);
}

static void note_place(ndm_i_header *header, const ndm_i_file *data)
{
    store(&header->inode, data->inode);
    store(&header->born, data->born);
}

static bool is_there(const ndm_i_header *header, const ndm_i_file *data)
{
    return ndm_i_word(&header->inode) == data->inode && ndm_i_word(&header->born) == data->born;
}

/* Is the time of a copy the one that was noted? The file system of the copy may round times down. */
static bool is_time(uint64_t noted, uint64_t found)
{
    static const uint64_t steps[] = {1, 100, 1000, 1000000, 1000000000, 2000000000}; /* nanoseconds */
    for (unsigned i = 0; i < sizeof steps / sizeof *steps; i++)
        if (noted != 0 && noted - noted % steps[i] == found)
            return true;
    return false;
}

ndm_i_kinship ndm_i_kinship_of(const ndm_i_header *header, const ndm_i_file *data)
{
    const ndm_i_identity wanted = noted(header->identity), before = noted(header->identity_before);
    const ndm_i_identity borne = ndm_i_identity_of(data);
    if (!ndm_i_identity_is_set(wanted))
        return is_there(header, data) ? NDM_I_SAME : ndm_i_identity_is_set(borne) ? NDM_I_STRANGERS : NDM_I_LOST;
    if (!ndm_i_identity_is_set(borne))
        return is_there(header, data) ? NDM_I_SAME : NDM_I_LOST;
    if (!ndm_i_identity_equal(borne, wanted) && !ndm_i_identity_equal(borne, before))
        return NDM_I_STRANGERS;
    /* Overlays may give a file another number; no copy keeps the time of birth. */
    if (is_there(header, data) || (data->born != 0 && ndm_i_word(&header->born) == data->born))
        return NDM_I_SAME;
    return is_time(ndm_i_word(&header->closed_at), data->modified) ? NDM_I_COPY : NDM_I_LIVE_COPY;
}

int ndm_i_kinship_check(ndm_i_kinship kinship)
{
    switch (kinship) {
    case NDM_I_LIVE_COPY:
        return ndm_i_fail_io(EUCLEAN, "the files were copied while the region was open, or moved after its owner was "
                                      "killed, and may not fit each other: recover and close the original first, then "
                                      "copy all files with their attributes and times");
    case NDM_I_LOST:
        return ndm_i_fail_io(EUCLEAN, "the slot table belongs to another file; if the data file is a copy, it has lost "
                                      "its attribute user.nodedb_mem.identity: copy all files again with their "
                                      "attributes (cp -a), or remove them to start afresh");
    case NDM_I_STRANGERS:
        return ndm_i_fail_io(EINVAL, "the slot table belongs to another region: bring the files of one region together, "
                                     "or remove them to start afresh");
    default:
        return NDM_OK;
    }
}

void ndm_i_kinship_begin(ndm_i_header *header, const ndm_i_file *data, const ndm_i_header *before)
{
    ndm_i_identity identity = ndm_i_identity_of(data);
    const bool keeps = before && ndm_i_identity_is_set(identity) && ndm_i_kinship_of(before, data) == NDM_I_SAME;
    if (!keeps)
        identity = ndm_i_identity_fresh();
    if (!keeps && !ndm_i_identity_set(data, identity))
        identity = (ndm_i_identity){{0, 0}};
    note(header->identity, identity);
}

/* Where the process dies between two stores, the file bears one of the two that are noted, or is known by its place. */
void ndm_i_kinship_renew(ndm_i_header *header, const ndm_i_file *data)
{
    const ndm_i_identity none = {{0, 0}}, borne = ndm_i_identity_of(data), wanted = noted(header->identity);
    bool bears = ndm_i_identity_is_set(wanted);
    if (ndm_i_kinship_of(header, data) == NDM_I_COPY) {
        const ndm_i_identity fresh = ndm_i_identity_fresh();
        note(header->identity_before, borne);
        note(header->identity, fresh);
        bears = ndm_i_identity_set(data, fresh);
    } else if (!ndm_i_identity_is_set(borne)) {
        const ndm_i_identity given = bears ? wanted : ndm_i_identity_fresh();
        bears = ndm_i_identity_set(data, given);
        note(header->identity_before, given);
        if (bears)
            note(header->identity, given);
    } else if (bears) {
        note(header->identity_before, borne);
        note(header->identity, borne); /* a former owner may have died in the middle of this */
    }
    note_place(header, data);
    if (!bears)
        note(header->identity, none);
    note(header->identity_before, none);
    store(&header->closed_at, 0);
}

void ndm_i_kinship_seal(ndm_i_header *header, const ndm_i_file *data)
{
    uint64_t stamp = 0;
    if (ndm_i_identity_is_set(noted(header->identity)))
        stamp = ndm_i_identity_stamp(data);
    if (stamp != 0)
        store(&header->closed_at, stamp);
}
