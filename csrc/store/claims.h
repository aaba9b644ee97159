/* Claims: entries in a file that processes share, each of which ends with the process that made it.
 *
 * Whoever claims entry n holds a write lock of the open file on byte n, which the kernel drops when the process dies. So
 * an entry whose byte nobody has locked is nobody's. What an entry says, and where it lies, is its owner's affair. The
 * locks are in the kernel, not in the file: who shortens the file takes no claim away.
 *
 * A process that opens the file twice has two sets of claims, which exclude each other like those of two processes.
 */
#ifndef NDM_CLAIMS_H
#define NDM_CLAIMS_H

#include "os/file.h"

enum { NDM_I_MOST_CLAIMS = 2048 };

typedef struct {
    const ndm_i_file *file;
    uint64_t count;                          /* entries are below */
    uint64_t mine[NDM_I_MOST_CLAIMS / 64];   /* a bit for each entry that this open file holds */
} ndm_i_claims;

void ndm_i_claims_init(ndm_i_claims *claims, const ndm_i_file *file, uint64_t count);

static inline bool ndm_i_claims_is_mine(const ndm_i_claims *claims, uint64_t entry)
{
    return claims->mine[entry / 64] >> entry % 64 & 1;
}

/* Claim an entry. false: it is claimed already, here or elsewhere. */
bool ndm_i_claims_take(ndm_i_claims *claims, uint64_t entry);

/* Let a claimed entry go. */
void ndm_i_claims_drop(ndm_i_claims *claims, uint64_t entry);

/* Does a living process claim the entry, through another open file than this? */
bool ndm_i_claims_is_held(const ndm_i_file *file, uint64_t entry);

/* Does one claim an entry of [*first, *end), through another open file? Then entries in a row that are claimed are given. One
 * system call. */
bool ndm_i_claims_find_held(const ndm_i_file *file, uint64_t *first, uint64_t *end);

#endif
