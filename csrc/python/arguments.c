/* From Python objects to what the core takes. */
#include "arguments.h"

#include "contents.h"

#include <stdlib.h>

bool ndm_i_has_count(Py_ssize_t given, Py_ssize_t wanted)
{
    if (given == wanted)
        return true;
    PyErr_Format(PyExc_TypeError, "%zd arguments are needed", wanted);
    return false;
}

bool ndm_i_get_slot(PyObject *object, int64_t *slot)
{
    int overflow = 0;
    PyObject *number = PyNumber_Index(object);
    if (!number)
        return false;
    *slot = PyLong_AsLongLongAndOverflow(number, &overflow);
    Py_DECREF(number);
    if (overflow)
        *slot = -1;
    return true;
}

bool ndm_i_get_number(PyObject *object, int64_t *number)
{
    *number = PyLong_AsLongLong(object);
    return *number != -1 || !PyErr_Occurred();
}

bool ndm_i_get_buffer(PyObject *object, Py_buffer *buffer, int flags)
{
    if (!ndm_i_holds_values(object))
        return false;
    if (PyObject_GetBuffer(object, buffer, flags) == 0)
        return true;
    /* NumPy says with a ValueError that an array is not contiguous, and gives it as it is when asked to. */
    if (PyErr_ExceptionMatches(PyExc_ValueError)) {
        PyErr_Clear();
        if (PyObject_GetBuffer(object, buffer, PyBUF_FULL_RO) == 0) {
            const bool writable = !buffer->readonly;
            PyBuffer_Release(buffer);
            PyErr_SetString(PyExc_BufferError, writable || flags == PyBUF_SIMPLE ? "the buffer is not C-contiguous"
                                                                                 : "the buffer is read-only");
        }
    }
    return false;
}

bool ndm_i_get_data(PyObject *object, Py_buffer *buffer)
{
    if (!PyBytes_CheckExact(object))
        return ndm_i_get_buffer(object, buffer, PyBUF_SIMPLE);
    buffer->obj = NULL;
    buffer->buf = PyBytes_AsString(object);
    buffer->len = PyBytes_Size(object);
    return true;
}

void ndm_i_let_go(Py_buffer *buffer)
{
    if (buffer->obj)
        PyBuffer_Release(buffer);
}

static bool get_numbers(PyObject *object, ndm_i_numbers *numbers, int flags)
{
    if (PyObject_GetBuffer(object, &numbers->buffer, flags) != 0)
        return false;
    numbers->at = numbers->buffer.buf;
    numbers->count = numbers->buffer.len / (Py_ssize_t)sizeof *numbers->at;
    return true;
}

bool ndm_i_get_numbers(PyObject *object, ndm_i_numbers *numbers) { return get_numbers(object, numbers, PyBUF_SIMPLE); }

bool ndm_i_get_room(PyObject *object, ndm_i_numbers *numbers, Py_ssize_t count)
{
    if (!get_numbers(object, numbers, PyBUF_WRITABLE))
        return false;
    if (numbers->count == count)
        return true;
    PyErr_Format(PyExc_TypeError, "room for %zd numbers is needed", count);
    PyBuffer_Release(&numbers->buffer);
    return false;
}

void ndm_i_gathered_free(ndm_i_gathered *all)
{
    while (all->got > 0)
        ndm_i_let_go(&all->buffers[--all->got]);
    free(all->buffers);
    free(all->parts);
    free(all->sizes);
    Py_XDECREF(all->values);
}

bool ndm_i_gather(PyObject *iterable, ndm_i_gathered *all)
{
    *all = (ndm_i_gathered){.values = PySequence_Tuple(iterable)};
    if (!all->values)
        return false;
    all->count = PyTuple_Size(all->values);
    if (all->count == 0) {
        PyErr_SetString(PyExc_ValueError, "no buffers given");
        return false;
    }
    all->buffers = calloc((size_t)all->count, sizeof *all->buffers);
    all->parts = calloc((size_t)all->count, sizeof *all->parts);
    all->sizes = calloc((size_t)all->count, sizeof *all->sizes);
    if (!all->buffers || !all->parts || !all->sizes) {
        PyErr_NoMemory();
        return false;
    }
    for (; all->got < all->count; all->got++) {
        Py_buffer *buffer = &all->buffers[all->got];
        if (!ndm_i_get_data(PyTuple_GetItem(all->values, all->got), buffer))
            return false;
        all->parts[all->got] = buffer->buf;
        all->sizes[all->got] = (uint64_t)buffer->len;
    }
    return true;
}
