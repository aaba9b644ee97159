/* See claims.h. */
#include "os/locks.h"
#include "store/claims.h"

#include <assert.h>

void ndm_i_claims_init(ndm_i_claims *claims, const ndm_i_file *file, uint64_t count)
{
    assert(count <= NDM_I_MOST_CLAIMS);
    *claims = (ndm_i_claims){.file = file, .count = count};
}

bool ndm_i_claims_take(ndm_i_claims *claims, uint64_t entry)
{
    assert(entry < claims->count);
    /* Its own byte is no obstacle to an open file: what is mine has to be known here. */
    if (ndm_i_claims_is_mine(claims, entry) || !ndm_i_file_lock_byte(claims->file, entry, true))
        return false;
    claims->mine[entry / 64] |= (uint64_t)1 << entry % 64;
    return true;
}

void ndm_i_claims_drop(ndm_i_claims *claims, uint64_t entry)
{
    assert(ndm_i_claims_is_mine(claims, entry));
    claims->mine[entry / 64] &= ~((uint64_t)1 << entry % 64);
    ndm_i_file_lock_byte(claims->file, entry, false);
}

bool ndm_i_claims_is_held(const ndm_i_file *file, uint64_t entry) { return ndm_i_file_is_byte_locked(file, entry); }

bool ndm_i_claims_find_held(const ndm_i_file *file, uint64_t *first, uint64_t *end)
{
    return ndm_i_file_find_lock(file, first, end);
}
