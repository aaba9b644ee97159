/* Opening: the holder is there before the core is asked, so that what it gives has an owner at once. */
#include "opening.h"

#include "objects.h"
#include "refusals.h"
#include "waiting.h"

#include <string.h>

static PyObject *opened(Holder *holder, bool done, const ndm_error *refusal)
{
    if (done)
        return (PyObject *)holder;
    ndm_i_refuse((PyObject *)holder, NULL, refusal);
    Py_DECREF(holder);
    return NULL;
}

static bool get_options(PyObject *object, ndm_options *options)
{
    Py_buffer buffer;
    if (PyObject_GetBuffer(object, &buffer, PyBUF_SIMPLE) != 0)
        return false;
    const bool fits = buffer.len == (Py_ssize_t)sizeof *options;
    if (fits)
        memcpy(options, buffer.buf, sizeof *options);
    else
        PyErr_SetString(PyExc_TypeError, "an ndm_options is needed");
    PyBuffer_Release(&buffer);
    return fits;
}

/* open_region(path or directory, temporary, buffer of an ndm_options, where) -> Holder */
static PyObject *open_region(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    const char *name;
    int temporary;
    PyObject *given, *where;
    ndm_options options;
    ndm_error refusal;
    Holder *holder;
    if (!PyArg_ParseTuple(arguments, "ypOO!", &name, &temporary, &given, &PyTuple_Type, &where) ||
        !get_options(given, &options) || !(holder = ndm_i_holder_new(where)))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    holder->region = temporary ? ndm_region_open_temporary(name, &options) : ndm_region_open(name, &options);
    ndm_i_noted(holder->region ? NDM_OK : -1, &refusal);
    Py_END_ALLOW_THREADS
    return opened(holder, holder->region != NULL, &refusal);
}

/* open_reader(paths of data, slots and leases, where) -> Holder */
static PyObject *open_reader(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    const char *data, *slots, *leases;
    PyObject *where;
    ndm_error refusal;
    ndm_i_wait wait = {0};
    Holder *holder;
    if (!PyArg_ParseTuple(arguments, "yyyO!", &data, &slots, &leases, &PyTuple_Type, &where) ||
        !(holder = ndm_i_holder_new(where)))
        return NULL;
    do {
        Py_BEGIN_ALLOW_THREADS
        holder->reader = ndm_reader_open(data, slots, leases);
        ndm_i_noted(holder->reader ? NDM_OK : -1, &refusal);
        Py_END_ALLOW_THREADS
    } while (!holder->reader && refusal.status == NDM_ERR_WAIT && ndm_i_go_on(&wait, &refusal, NDM_ERR_BUSY));
    return opened(holder, holder->reader != NULL, &refusal);
}

PyMethodDef ndm_i_opening[] = {
    {"open_region", open_region, METH_VARARGS, NULL},
    {"open_reader", open_reader, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
