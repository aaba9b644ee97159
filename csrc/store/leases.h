/* Leases: values that a reader, in any process, keeps in place. They live in a small file of their own
 * (`<path>.leases`; in memory for a temporary region), which readers that may lease can write to.
 *
 * A lease is an entry: its key, which is slot and generation, packed; the incarnation that these belong to; and the
 * value's place, by which an owner that takes the file over knows what a freed value's lease keeps. Entries are claimed
 * (claims.h): one that no living process claims says nothing. Only who has claimed an entry writes to it.
 *
 * Nobody maps the file. Whoever may lease may also shorten it, or punch holes, and a load or store through a mapping would
 * be SIGBUS then, in the owner or in another reader. By pread an entry that is not there is an empty one: its lease is lost,
 * as if its reader had released it, and nothing else is. By pwrite the file grows again.
 *
 * The owner asks the kernel whether anybody claims an entry, and reads entries only then. Each question is a system call, so
 * the owner looks round once for many values (limbo.h), and once before it compacts.
 *
 * Memory order: the reader claims the entry and writes it, then a seq_cst fence, then checks that the value is still live,
 * and where it was, and that the incarnation stands. The owner withdraws the value, or the incarnation, then a seq_cst
 * fence, then asks for claims and reads their entries. One of them sees the other: the kernel's list of locks and the file's
 * page are memory like the record, which a system call reads and writes on the thread that makes the call. So for each
 * side the fence orders its store (of a lock and an entry, or of the record) before its load (of the record, or of the
 * locks and the entries), as it would between two words of a mapping. That the store was a system call's does not weaken
 * this: it has been made when the call returns.
 *
 * Readers are other processes: the owner takes nothing in the file for true that could hurt a value.
 */
#ifndef NDM_LEASES_H
#define NDM_LEASES_H

#include "nodedb_mem.h"
#include "os/file.h"
#include "store/claims.h"

#include <stdbool.h>
#include <stdint.h>

enum { NDM_I_LEASES = NDM_MOST_LEASES };

/* A range of the data file, in bytes. */
typedef struct {
    uint64_t offset, size;
} ndm_i_span;

/* What the owner found leased: nothing, what its note says, or that it could not be told. */
enum { NDM_I_NOTHING, NDM_I_SOMETHING, NDM_I_ANYTHING };

typedef struct {
    ndm_i_file file;      /* closed (-1): there is none yet */
    uint64_t incarnation; /* of the region: leases of another are no slot's */
    struct ndm_i_lease_note *note; /* the owner's, with what it found when it last looked round */
    int noted;            /* NDM_I_NOTHING, ... */
    ndm_i_claims claims;  /* a reader's: the entries it holds */
    uint64_t latest;      /* a reader's: the entry that it claimed last */
} ndm_i_leases;

static inline bool ndm_i_leases_are_open(const ndm_i_leases *leases) { return leases->file.fd >= 0; }

/* The owner's: make the file; one of another version makes room for a new file. The owner's that finds one, and a
 * reader's: open it to read and write; ENOENT if there is none. Then `incarnation` is to be set. */
int ndm_i_leases_start(ndm_i_leases *leases, const char *path);
int ndm_i_leases_join(ndm_i_leases *leases, const char *path, bool as_owner);

/* The owner's, of an open file: somebody may have shortened it; let readers lease again. */
int ndm_i_leases_mend(ndm_i_leases *leases);

/* Close the file; what a reader still holds is released. */
void ndm_i_leases_close(ndm_i_leases *leases);

/* Reader: take an entry, giving its number; the caller checks the value and its place afterwards. To release one that
 * is not held does nothing. */
int64_t ndm_i_leases_claim(ndm_i_leases *leases, uint32_t slot, uint32_t generation, ndm_i_span place);
void ndm_i_leases_release(ndm_i_leases *leases, uint64_t entry);

/* Owner: is anything leased? After withdrawing a value, where that matters. A system call if there is a file. */
bool ndm_i_leases_any(const ndm_i_leases *leases);

/* Owner: look at all leases at once, and note them. One system call where nothing is leased. Answers about values that were
 * withdrawn before are final; about others they are a hint, because a reader may lease a value at any moment. What the disk
 * fails to tell is taken for leased. */
void ndm_i_leases_look_round(ndm_i_leases *leases);

/* Owner: was the value leased when the owner last looked round, and is it still? */
bool ndm_i_leases_find_noted(ndm_i_leases *leases, uint32_t slot, uint32_t generation);

static inline bool ndm_i_leases_noted(ndm_i_leases *leases, uint32_t slot, uint32_t generation)
{
    return leases->noted != NDM_I_NOTHING && ndm_i_leases_find_noted(leases, slot, generation);
}

/* Owner: did a lease, of any incarnation, touch these bytes then, and does it still? */
bool ndm_i_leases_touched(ndm_i_leases *leases, ndm_i_span bytes);

/* Owner: is the value leased now? It looks round for that. */
static inline bool ndm_i_leases_has(ndm_i_leases *leases, uint32_t slot, uint32_t generation)
{
    ndm_i_leases_look_round(leases);
    return ndm_i_leases_noted(leases, slot, generation);
}

/* Owner: the places of all leases, as their readers tell them; room for NDM_I_LEASES. How many, or a status. */
int64_t ndm_i_leases_places(const ndm_i_leases *leases, ndm_i_span *places);

/* The owner's that comes: empty the entries that nobody claims. Linear. */
void ndm_i_leases_reap(ndm_i_leases *leases);

/* Anybody: how many leases living processes hold, read from the file anew; 0 if there is none. `places` is NULL or has
 * room for NDM_I_LEASES. Needs to read the file, no more. */
int64_t ndm_i_leases_look(const char *path, ndm_i_span *places);

#endif
