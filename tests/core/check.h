/* What a test program ends with when something is wrong: where, what, and the core's last error. */
#ifndef CHECK_H
#define CHECK_H

#include "nodedb_mem.h"

#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                              \
    do {                                                                                              \
        if (!(condition)) {                                                                           \
            fprintf(stderr, "%s:%d: %s (last error: %d, errno %d, %s)\n", __FILE__, __LINE__,         \
                    #condition, ndm_last_error()->status, ndm_last_error()->os_errno,                 \
                    ndm_last_error()->message ? ndm_last_error()->message : "none");                  \
            exit(1);                                                                                  \
        }                                                                                             \
    } while (0)

#endif
