/* The background writer: how much of the file stays in RAM.
 *
 * Where a limit is set, a thread starts write-back of grains as they come to RAM, and drops the oldest. It is started
 * when half the limit is in use and ends with the region. The owner waits for it only while more than the limit is in
 * RAM. A forked child has no such thread and needs none.
 *
 * The queue holds the numbers of the grains in the order they came to RAM. A grain that left RAM otherwise loses its mark
 * NDM_I_QUEUED, and its entry is stale.
 */
#ifndef NDM_WRITER_H
#define NDM_WRITER_H

#include "os/file.h"
#include "os/gate.h"
#include "store/grains.h"

#include <pthread.h>

#define NDM_I_UNLIMITED UINT64_MAX

typedef struct {
    ndm_i_file *file;
    ndm_i_grains *grains;
    const _Atomic uint64_t *storing; /* extents that others may be storing to, through the mapping */
    ndm_i_gate *gate;                /* of the region, or NULL */
    unsigned writing;                /* threads that let others in while they write to the file */
    bool awaited;                    /* somebody waits until they have come back */
    uint64_t limit; /* grains; NDM_I_UNLIMITED: no queue is kept and no thread runs */
    pthread_mutex_t lock;
    pthread_mutex_t disk; /* held from waiting for write-back until the pages are dropped, or an error is dealt with: the
                             kernel reports a failure once, to whoever waits. Never taken with `lock` held. */
    pthread_cond_t work, room;
    pthread_t thread;
    bool running, stopping;
    _Atomic(ndm_i_mapping *) looking; /* the mapping that the thread uses while it works */
    uint32_t *queue; /* ring of grain numbers */
    uint64_t queue_room, head, kicked, tail; /* counters; [head, kicked) is being written back; `& (room - 1)` indexes */
    uint64_t resident;     /* QUEUED grains, and those being dropped */
    uint64_t written_back; /* bytes whose write-back was started */
    _Atomic uint64_t drops; /* times that something was dropped */
    _Atomic int error;     /* errno of a failed write-back, for the owner's next call */
    bool suspect;          /* one has failed, and what is in RAM was not yet found on disk since. Owner only. */
} ndm_i_writer;

/* For a file that has been started. `limit`: bytes, or NDM_I_UNLIMITED. A status. */
int ndm_i_writer_init(ndm_i_writer *writer, ndm_i_file *file, ndm_i_grains *grains, const _Atomic uint64_t *storing,
                      uint64_t limit);
void ndm_i_writer_fini(ndm_i_writer *writer); /* ends the thread; a forked child has none, and frees what it can */

/* In a forked child: the thread that is gone uses no mapping. Of one that was never started, or has ended: does nothing. */
void ndm_i_writer_leave_in_child(ndm_i_writer *writer);

/* The owner has brought bytes of the grains [first, last) to RAM. May wait until there is room, and lets others in
 * meanwhile. */
void ndm_i_writer_admit(ndm_i_writer *writer, uint64_t first, uint64_t last);

/* Before settle(): what it finds to have failed is written again, and nobody may write beside that. Waits for write-back of
 * [start, end) and lets others in, if that is allowed; what fails is left for settle() to find. Then waits for those who
 * are writing. */
void ndm_i_writer_settle_ahead(ndm_i_writer *writer, uint64_t start, uint64_t end);

/* Let others in, if that is allowed, while the file is written to. */
bool ndm_i_writer_let(ndm_i_writer *writer);
void ndm_i_writer_come_back(ndm_i_writer *writer, bool let);

/* Wait for write-back of [start, end), and drop it from RAM if `drop`. If that fails, or has failed in the background,
 * nothing is dropped, and all that is in RAM is salvaged; and again by each call, until all of it is found on disk. Owner
 * only. 0 or errno. */
int ndm_i_writer_settle(ndm_i_writer *writer, uint64_t start, uint64_t end, bool drop);

/* The grains [first, last) are not in RAM any more. With the lock held. */
void ndm_i_writer_forget(ndm_i_writer *writer, uint64_t first, uint64_t last);

/* How many invariants of the queue are broken. */
uint64_t ndm_i_writer_check(ndm_i_writer *writer);

static inline bool ndm_i_writer_is_limited(const ndm_i_writer *writer) { return writer->limit != NDM_I_UNLIMITED; }

static inline void ndm_i_writer_lock(ndm_i_writer *writer)
{
    if (ndm_i_writer_is_limited(writer))
        pthread_mutex_lock(&writer->lock);
}

static inline void ndm_i_writer_unlock(ndm_i_writer *writer)
{
    if (ndm_i_writer_is_limited(writer))
        pthread_mutex_unlock(&writer->lock);
}

#endif
