/* Waiting for another process, but not for long. A verb that has to wait tries again after pauses, and gives up after some
 * milliseconds: its caller may hear signals meanwhile, and decides whether to call again. Nobody holds a lock while it
 * pauses.
 */
#ifndef NDM_PATIENCE_H
#define NDM_PATIENCE_H

#include <stdbool.h>
#include <stdint.h>

/* In nanoseconds, of a clock that only goes forward. */
uint64_t ndm_i_now(void);

/* All zeros before the first pause. */
typedef struct {
    uint64_t began;
    uint64_t pause; /* the last one */
} ndm_i_patience;

/* Pause, each time longer. false, and no pause, when the time is over. */
bool ndm_i_pause(ndm_i_patience *patience);

#endif
