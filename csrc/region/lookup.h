/* A reader, and how it finds values in a table that its owner, in another thread or process, is writing to. The verbs are in
 * reader.c and lease.c. Rests on store/ only: the owner's side is not known here. */
#ifndef NDM_LOOKUP_H
#define NDM_LOOKUP_H

#include "store/leases.h"
#include "nodedb_mem.h"
#include "os/fork.h"
#include "store/slots.h"
#include "store/pins.h"

#include <pthread.h>

/* How long a file is, and until when that is not asked anew. */
typedef struct {
    uint64_t bytes, until;
} ndm_i_length;

struct ndm_reader {
    ndm_i_file data, slots;
    ndm_i_mapping *values, *table;
    ndm_i_leases leases;
    char *data_path, *leases_path;
    ndm_i_home home;
    pthread_mutex_t lock; /* of the mappings and the leases */
    uint64_t process;
    uint64_t incarnation;
    uint64_t moment; /* when a verb began */
    ndm_i_length slots_length, data_length;
    _Atomic unsigned holders; /* of this struct: the handle, and the files until the last view has ended */
    ndm_i_fork_entry at_fork;
    bool home_left; /* the reader no longer uses its home */
    bool left;      /* in a forked child: the reader was let go of */
};

static inline const ndm_i_header *ndm_i_reader_header(const ndm_reader *reader)
{
    return (const ndm_i_header *)reader->table->base;
}

static inline uint64_t ndm_i_acquire(const _Atomic uint64_t *word)
{
    return atomic_load_explicit(word, memory_order_acquire);
}

/* Take the lock if the reader may be used, and the slot table was long enough to be looked at a moment ago. The others want the lock
 * held. */
int ndm_i_reader_enter(ndm_reader *reader);

/* Is it still the region that the reader was opened for? */
int ndm_i_reader_check(const ndm_reader *reader);

/* Find the value in a slot; `generation` negative: any. NDM_ERR_WAIT while its owner, who lives, moves it: the caller gives
 * the lock back, and pauses. */
int ndm_i_reader_look_up(ndm_reader *reader, int64_t slot, int64_t generation, ndm_value *out);

/* Are the value's bytes where they were, and unchanged since it was looked up? */
bool ndm_i_reader_is_unchanged(const ndm_reader *reader, const ndm_value *value);

/* Have its bytes mapped. */
int ndm_i_reader_reach(ndm_reader *reader, const ndm_value *value);

/* A view of its bytes, which keeps their mapping; not fetched. NULL with the error set. */
const char *ndm_i_reader_view(ndm_reader *reader, const ndm_value *value);

/* The same, and what is not in RAM is fetched. */
const char *ndm_i_reader_fetch_view(ndm_reader *reader, const ndm_value *value);

/* Copy its bytes. The owner may be writing them: what is copied counts only if the record is unchanged afterwards. */
int ndm_i_reader_load(ndm_reader *reader, const ndm_value *value, char *buffer);

#endif
