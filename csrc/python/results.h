/* What the core gives, as Python takes it. */
#ifndef NDM_PYTHON_RESULTS_H
#define NDM_PYTHON_RESULTS_H

#include "objects.h"

/* The memoryview of a view that the core was asked for, and refused where `address` is NULL; takes the caller's
 * reference to `view`. `holder` and `slot` are for the message. NULL with an exception. */
PyObject *ndm_i_viewed(View *view, const char *address, uint64_t size, PyObject *holder, PyObject *slot,
                       const ndm_error *refusal);

/* Memoryviews of `count` views that the core has given; all are released where one cannot be had. */
PyObject *ndm_i_list_of_views(const char **addresses, const uint64_t *sizes, Py_ssize_t count);

/* A value that is to be copied: a region's, or a reader's. */
typedef struct {
    ndm_region *region;
    ndm_reader *reader;
    int64_t slot, generation;
} ndm_i_source;

/* Copy the value if it fits, without the GIL. Its size, or a negative status with the refusal noted. */
int64_t ndm_i_copy(const ndm_i_source *from, void *buffer, int64_t room, ndm_error *refusal);

/* None, once values of `total` bytes were copied into a buffer that has `room`. NULL with an exception where there are more,
 * or `total` is a negative status. */
PyObject *ndm_i_loaded(int64_t total, Py_ssize_t room, PyObject *holder, const ndm_error *refusal);

/* A copy of the value. `holder` and `slot` are for the message. NULL with an exception. */
PyObject *ndm_i_bytes_of(const ndm_i_source *from, PyObject *holder, PyObject *slot);

#endif
