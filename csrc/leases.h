/* Leases: values that a reader, in any process, keeps in place. They live in a small mapped file of their own
 * (`<path>.leases`; in memory for a temporary region), which readers that may lease can write to.
 *
 * A lease is an entry: slot and generation, packed. Whoever claims it holds a lock of the open file on the byte of the
 * same number, which the kernel drops when the process dies; so an entry without a lock is nobody's.
 *
 * Memory order: the reader stores the entry, then a seq_cst fence, then checks that the value is still live. The owner
 * withdraws the value, then a seq_cst fence, then looks for an entry. One of them sees the other.
 */
#ifndef NDM_LEASES_H
#define NDM_LEASES_H

#include "backing.h"

#include <stdbool.h>
#include <stdint.h>

enum { NDM_I_LEASES = 2000 };

typedef struct {
    char magic[8];
    _Atomic uint64_t held;     /* no fewer than the entries in use: 0 spares the owner a look */
    _Atomic uint64_t released; /* grows with each release */
    _Atomic uint64_t entries[NDM_I_LEASES]; /* slot + 1 (32 bits), generation (32); 0: free */
} ndm_i_lease_table;

typedef struct {
    ndm_i_backing file;
    ndm_i_lease_table *table; /* NULL: there is none yet */
    uint64_t seen;            /* the owner's: `released` when it last collected */
    uint64_t mine[(NDM_I_LEASES + 63) / 64]; /* a reader's: a bit for each entry it holds */
} ndm_i_leases;

/* The owner's: make or empty the file. The owner's that takes values over, and a reader's: open it to read and write;
 * ENOENT if there is none. */
int ndm_i_leases_start(ndm_i_leases *leases, const char *path);
int ndm_i_leases_join(ndm_i_leases *leases, const char *path);

/* Close the file; what a reader still holds is released. */
void ndm_i_leases_close(ndm_i_leases *leases);

/* Reader: claim an entry, giving its number; the caller checks the value afterwards. To release one that is not held
 * does nothing. */
int64_t ndm_i_leases_claim(ndm_i_leases *leases, uint32_t slot, uint32_t generation);
void ndm_i_leases_release(ndm_i_leases *leases, uint64_t entry);

/* Owner: is the value leased? After withdrawing it, where that matters. */
bool ndm_i_leases_has(const ndm_i_leases *leases, uint32_t slot, uint32_t generation);

/* Free the entries of processes that are gone. Linear. */
void ndm_i_leases_reap(ndm_i_leases *leases);

/* Owner: has a lease been released since the last call? */
bool ndm_i_leases_news(ndm_i_leases *leases);

/* Owner: how many are held. */
uint64_t ndm_i_leases_count(const ndm_i_leases *leases);

#endif
