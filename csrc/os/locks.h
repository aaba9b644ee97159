/* Locks on an open file: on single bytes, which die with their process, and on the file as a whole. */
#ifndef NDM_LOCKS_H
#define NDM_LOCKS_H

#include "os/file.h"

/* Lock, or unlock, one byte for this open file. false: another has it. */
bool ndm_i_file_lock_byte(const ndm_i_file *file, uint64_t byte, bool lock);

/* The same, but wait so long for the byte. 0 or errno: ETIMEDOUT. */
int ndm_i_file_await_byte(const ndm_i_file *file, uint64_t byte, uint64_t nanoseconds);

/* Has another open file a byte of [*start, *end)? Then a range that it has is given, cut at those ends. A lock that reading is
 * enough for (F_RDLCK) does not count: what is asked for is a lock that only who may write to the file can hold. Where the
 * system cannot tell, all of the range is. */
bool ndm_i_file_find_lock(const ndm_i_file *file, uint64_t *start, uint64_t *end);

/* Has another open file that byte? */
bool ndm_i_file_is_byte_locked(const ndm_i_file *file, uint64_t byte);

/* `whole`: lock the file against readers, false if there are some. Otherwise let them in again. */
bool ndm_i_file_flock(const ndm_i_file *file, bool whole);

/* Say that a reader is there, until the file is closed. NDM_ERR_WAIT while somebody bars readers. */
int ndm_i_file_flock_to_read(const ndm_i_file *file);

#endif
