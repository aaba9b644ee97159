/* Leases: values that a reader, in any process, keeps in place. They live in a small mapped file of their own
 * (`<path>.leases`; in memory for a temporary region), which readers that may lease can write to.
 *
 * A lease is an entry: its key, which is slot and generation, packed; the incarnation that these belong to; and the
 * value's place, by which an owner that takes the file over knows what a freed value's lease keeps. Entries are claimed
 * (claims.h): one that no living process claims is nobody's. Only who has claimed it stores more than a key of 0.
 *
 * Memory order: the reader stores the place, the key (release), then a seq_cst fence, then checks that the value is
 * still live, and where it was, and that the incarnation stands. The owner withdraws the value, or the incarnation, then
 * a seq_cst fence, then looks for a key. One of them sees the other.
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

typedef struct {
    _Atomic uint64_t key; /* slot + 1 (32 bits), generation (32); 0: free */
    _Atomic uint64_t incarnation, offset, size;
} ndm_i_lease;

/* The magic, then the version, are the same in every version but the first, which had no version and another size. */
typedef struct {
    char magic[8];
    uint64_t version;
    _Atomic uint64_t held;     /* no fewer than the entries in use: 0 spares the owner a look */
    _Atomic uint64_t released; /* grows with each release */
    ndm_i_lease entries[NDM_I_LEASES];
} ndm_i_lease_table;

/* A range of the data file, in bytes. */
typedef struct {
    uint64_t offset, size;
} ndm_i_span;

typedef struct {
    ndm_i_file file;
    ndm_i_lease_table *table; /* NULL: there is none yet */
    uint64_t incarnation;     /* of the region: leases of another are no slot's */
    uint64_t seen;            /* the owner's: `released` when it last collected */
    ndm_i_claims claims;      /* a reader's: the entries it holds */
} ndm_i_leases;

/* The owner's: make or empty the file; one of another version makes room for a new file. The owner's that finds one,
 * and a reader's: open it to read and write; ENOENT if there is none. Then `incarnation` is to be set. */
int ndm_i_leases_start(ndm_i_leases *leases, const char *path);
int ndm_i_leases_join(ndm_i_leases *leases, const char *path, bool as_owner);

/* Close the file; what a reader still holds is released. */
void ndm_i_leases_close(ndm_i_leases *leases);

/* Reader: take an entry, giving its number; the caller checks the value and its place afterwards. To release one that
 * is not held does nothing. */
int64_t ndm_i_leases_claim(ndm_i_leases *leases, uint32_t slot, uint32_t generation, ndm_i_span place);
void ndm_i_leases_release(ndm_i_leases *leases, uint64_t entry);

/* Owner: is anything leased? After withdrawing a value, where that matters. */
static inline bool ndm_i_leases_any(const ndm_i_leases *leases)
{
    return leases->table && atomic_load(&leases->table->held) != 0;
}

/* Owner: is the value leased? After withdrawing it, where that matters. */
bool ndm_i_leases_has(const ndm_i_leases *leases, uint32_t slot, uint32_t generation);

/* Owner: does a lease of any incarnation touch these bytes? */
bool ndm_i_leases_touch(const ndm_i_leases *leases, ndm_i_span bytes);

/* Owner: the places of all leases, as their readers tell them; room for NDM_I_LEASES. */
uint64_t ndm_i_leases_places(const ndm_i_leases *leases, ndm_i_span *places);

/* Free the entries of processes that are gone. Linear. */
void ndm_i_leases_reap(ndm_i_leases *leases);

/* Owner: has a lease been released since the last call? */
bool ndm_i_leases_news(ndm_i_leases *leases);

/* Anybody: how many leases living processes hold, read from the file anew; 0 if there is none. `places` is NULL or has
 * room for NDM_I_LEASES. Needs to read the file, no more. */
int64_t ndm_i_leases_look(const char *path, ndm_i_span *places);

#endif
