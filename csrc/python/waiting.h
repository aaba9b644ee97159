/* Waiting for the core, which gives NDM_ERR_WAIT where it would have to wait longer than some milliseconds. The verb hears
 * signals then, and asks again, for ten seconds. */
#ifndef NDM_PYTHON_WAITING_H
#define NDM_PYTHON_WAITING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "nodedb_mem.h"

#include <stdbool.h>
#include <stdint.h>

/* All zeros before the first call. */
typedef struct {
    int64_t began; /* in seconds */
} ndm_i_wait;

/* With the GIL: is the core to be asked again? If not, an exception is set; or the time is over, and the refusal is `status`
 * from now on. */
bool ndm_i_go_on(ndm_i_wait *wait, ndm_error *refusal, int status);

#endif
