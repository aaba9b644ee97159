/* What a file of ours is known by: its identity, a random number that stands in an extended attribute of the file, and
 * the time of its last change. Both travel with `mv` to another disk and with `cp -a`, which inode numbers do not.
 *
 * Whoever may write to a file may set its attribute. So it tells files of ours apart; it does not prove anything of a
 * file of another user, which is never opened.
 */
#ifndef NDM_IDENTITY_H
#define NDM_IDENTITY_H

#include "os/file.h"

typedef struct {
    uint64_t words[2]; /* both 0: none */
} ndm_i_identity;

static inline bool ndm_i_identity_is_set(ndm_i_identity one) { return (one.words[0] | one.words[1]) != 0; }

static inline bool ndm_i_identity_equal(ndm_i_identity one, ndm_i_identity other)
{
    return one.words[0] == other.words[0] && one.words[1] == other.words[1];
}

/* A number that nobody else gets. */
ndm_i_identity ndm_i_identity_fresh(void);

/* The identity that the file bears; none where it bears none, or the file system knows no attributes. */
ndm_i_identity ndm_i_identity_of(const ndm_i_file *file);

/* Have the file bear it. false: the file system would not. */
bool ndm_i_identity_set(const ndm_i_file *file, ndm_i_identity identity);

/* Set the time of the file's last change to now, finer than the system's own ticks where the file system keeps that. Returns
 * the time as the file has it, in nanoseconds; 0 where it cannot be set. */
uint64_t ndm_i_identity_stamp(const ndm_i_file *file);

#endif
