/* How a refusal of the core becomes an exception: the one function that Python has registered for it makes it.
 *
 * The details of a refusal wait in ndm_last_error() until the next refusal on the same thread. A signal handler, or a
 * finalizer that a collection runs, may cause that as soon as the thread holds the GIL again. So each verb copies the
 * details beside its call of the core, by ndm_i_noted(), and hands the copy on. */
#ifndef NDM_PYTHON_REFUSALS_H
#define NDM_PYTHON_REFUSALS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "nodedb_mem.h"

/* What the core has just returned; where that is negative, the details go to `refusal`. */
static inline int64_t ndm_i_noted(int64_t result, ndm_error *refusal)
{
    if (result < 0)
        *refusal = *ndm_last_error();
    return result;
}

/* translate_with(function): call function(bytes of an ndm_error, where, slot or None) for an exception from now on. */
PyObject *ndm_i_translate_with(PyObject *module, PyObject *function);

/* Raise what was refused to a holder. `slot` is the number that the caller named, for the message; NULL if the call
 * named no slot, or several. Always returns NULL, with an exception set. */
PyObject *ndm_i_refuse(PyObject *holder, PyObject *slot, const ndm_error *refusal);

#endif
