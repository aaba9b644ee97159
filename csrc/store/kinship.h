/* Do a slot table and a data file belong together? The table notes which file it speaks of: by the identity that the
 * file bears (identity.h) and, where the file system has no attributes, by its inode number and time of birth.
 *
 * Files that were moved to another disk, or copied together with their attributes, are a region again: the same identity
 * in another file. A copy is good only if nobody changed the one file while the other was copied. A table that its owner
 * closed notes the time of the data file's last change, which `mv` and `cp -a` keep; so a copy with that time was made
 * after the close. A table whose owner lived, or was killed, notes none.
 */
#ifndef NDM_KINSHIP_H
#define NDM_KINSHIP_H

#include "os/identity.h"
#include "store/slots.h"

typedef enum {
    NDM_I_SAME,      /* the very file */
    NDM_I_COPY,      /* the region was moved, or copied whole, after it was closed */
    NDM_I_LIVE_COPY, /* copied while the region was open, or after its owner was killed */
    NDM_I_LOST,      /* another file, which bears no identity: a copy without attributes, or something else */
    NDM_I_STRANGERS  /* another region's file */
} ndm_i_kinship;

ndm_i_kinship ndm_i_kinship_of(const ndm_i_header *header, const ndm_i_file *data);

/* NDM_OK for the first two; a status that says what is wrong, and what to do, for the others. */
int ndm_i_kinship_check(ndm_i_kinship kinship);

/* The table of a new region: have the data file bear an identity, and note it. The one that it bears stays if the table
 * that was there `before` speaks of this file. */
void ndm_i_kinship_begin(ndm_i_header *header, const ndm_i_file *data, const ndm_i_header *before);

/* The table is taken over with this file, which was found to be the same or a copy. A copy gets an identity of its own, so
 * that its files and those of the first are strangers from now on. Whenever the process dies meanwhile, the two files
 * still know each other. */
void ndm_i_kinship_renew(ndm_i_header *header, const ndm_i_file *data);

/* The owner closes the region. */
void ndm_i_kinship_seal(ndm_i_header *header, const ndm_i_file *data);

#endif
