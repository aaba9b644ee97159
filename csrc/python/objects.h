/* What cffi cannot give: Python objects that stand for the core's memory.
 *
 * A view has to be read-only for everybody who can reach its memory, memoryview.obj included, and has to end when the
 * last object that uses it is gone, not before: the finalizers of a cycle run in any order, and cffi's ffi.gc() is one
 * of them, so that a __del__ in the same cycle would meet a region, or a view, that has ended. The types here have no
 * finalizer: the collector frees them after all finalizers have run. Nor can a signal part what the core has given from
 * its owner: the object is there before the core is asked.
 *
 *   Holder  owns a region, a reader, or a governor. cffi's functions get the pointer through its buffer, which keeps it
 *           alive. It also carries what an error message says of it: a tuple of strings, so that no cycle can pass through
 *           it. A governor's has more of that kind (governing.h).
 *   View    owns one view, and the lease that keeps it, if any. Its buffer is the value.
 */
#ifndef NDM_PYTHON_OBJECTS_H
#define NDM_PYTHON_OBJECTS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "nodedb_mem.h"

#include <stdbool.h>

typedef struct {
    PyObject_HEAD
    ndm_region *region; /* one of these */
    ndm_reader *reader;
    ndm_governor *governor;
    PyObject *where; /* a tuple */
    /* A governor's. */
    PyObject *facade;              /* a weak reference to the Python object, or NULL */
    PyObject *names;               /* a dict: the engine that a number stands for; or NULL */
    unsigned long long repeated;   /* releases of what had been released */
    unsigned long long unreleased; /* reservations that were collected before they were released */
    int attention;                 /* not 0: the facade wants to hear of reservations and releases */
    int traced;                    /* not 0: note where reservations are made */
} Holder;

typedef struct {
    PyObject_HEAD
    const char *address; /* NULL until the core has given it */
    uint64_t size;
    bool writable;
    Holder *leased_by; /* NULL: no lease */
    int64_t lease;
    uint64_t offset; /* of what is leased, in its file */
} View;

/* Make the types. 0, or -1 with an exception. */
int ndm_i_objects_init(void);

/* Objects to be filled in. NULL with an exception. */
Holder *ndm_i_holder_new(PyObject *where);
View *ndm_i_view_new(bool writable);

/* The memoryview of a view that is filled in; takes the caller's reference. NULL with an exception. */
PyObject *ndm_i_view_memory(View *view);

/* What a holder holds. NULL with an exception for anything else. */
ndm_region *ndm_i_held_region(PyObject *holder);
ndm_reader *ndm_i_held_reader(PyObject *holder);
Holder *ndm_i_held_governor(PyObject *holder);

/* What an error message says of a holder. A borrowed reference. */
PyObject *ndm_i_holder_where(PyObject *holder);

/* NULL with an exception for anything but a view. */
View *ndm_i_as_view(PyObject *object);

#endif
