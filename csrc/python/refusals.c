/* The translator of refusals: registered by the package once, called for every refusal. */
#include "refusals.h"

#include "objects.h"

static PyObject *translator; /* NULL until there is one; kept until the process ends */

PyObject *ndm_i_translate_with(PyObject *Py_UNUSED(module), PyObject *function)
{
    PyObject *before = translator;
    translator = Py_NewRef(function);
    Py_XDECREF(before);
    Py_RETURN_NONE;
}

/* What the translator makes of it. A new reference, or NULL with an exception. */
static PyObject *translated(PyObject *holder, PyObject *number, const ndm_error *refusal)
{
    if (!translator) {
        PyErr_Format(PyExc_SystemError, "nodedb_mem: no translator for status %d", (int)refusal->status);
        return NULL;
    }
    PyObject *error = NULL;
    PyObject *function = Py_NewRef(translator); /* it may register another */
    PyObject *details = PyBytes_FromStringAndSize((const char *)refusal, sizeof *refusal);
    if (details)
        error = PyObject_CallFunctionObjArgs(function, details, ndm_i_holder_where(holder), number, NULL);
    Py_XDECREF(details);
    Py_DECREF(function);
    return error;
}

PyObject *ndm_i_refuse(PyObject *holder, PyObject *slot, const ndm_error *refusal)
{
    if (PyErr_Occurred()) /* a signal handler's, while the verb waited */
        return NULL;
    PyObject *number = slot ? PyNumber_Index(slot) : Py_NewRef(Py_None);
    if (!number)
        return NULL;
    PyObject *error = translated(holder, number, refusal);
    if (error && PyExceptionInstance_Check(error))
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    else if (error)
        PyErr_Format(PyExc_SystemError, "nodedb_mem: the translator gave no exception for status %d",
                     (int)refusal->status);
    Py_XDECREF(error);
    Py_DECREF(number);
    return NULL;
}
