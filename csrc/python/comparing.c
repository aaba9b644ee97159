/* Whether bytes are what they were: by comparing them, or by the pages of a private mapping. */
#include "comparing.h"

#include "arguments.h"
#include "pagemap.h"

#include <string.h>

/* address_of(buffer) -> int */
static PyObject *address_of(PyObject *Py_UNUSED(module), PyObject *object)
{
    Py_buffer buffer;
    if (PyObject_GetBuffer(object, &buffer, PyBUF_SIMPLE) < 0)
        return NULL;
    PyObject *address = PyLong_FromVoidPtr(buffer.buf);
    PyBuffer_Release(&buffer);
    return address;
}

/* is_at(part, whole, start) -> bool: are the bytes of `whole` from `start` on equal to all of `part`? */
static PyObject *is_at(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    Py_buffer part, whole;
    int64_t start;
    if (!ndm_i_has_count(count, 3) || !ndm_i_get_number(arguments[2], &start) ||
        PyObject_GetBuffer(arguments[0], &part, PyBUF_SIMPLE) < 0)
        return NULL;
    if (PyObject_GetBuffer(arguments[1], &whole, PyBUF_SIMPLE) < 0) {
        PyBuffer_Release(&part);
        return NULL;
    }
    bool same = start >= 0 && start <= whole.len && part.len <= whole.len - start;
    if (same) {
        Py_BEGIN_ALLOW_THREADS
        same = memcmp(part.buf, (const char *)whole.buf + start, (size_t)part.len) == 0;
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&whole);
    PyBuffer_Release(&part);
    return PyBool_FromLong(same);
}

/* has_changed(pagemap, private, by_page) -> bool, or None where the kernel does not tell */
static PyObject *has_changed(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    Py_buffer mapped;
    int64_t pagemap;
    int changed;
    if (!ndm_i_has_count(count, 3) || !ndm_i_get_number(arguments[0], &pagemap) ||
        PyObject_GetBuffer(arguments[1], &mapped, PyBUF_SIMPLE) < 0)
        return NULL;
    if (PyObject_IsTrue(arguments[2]) == 1) {
        Py_BEGIN_ALLOW_THREADS
        changed = ndm_i_is_changed_by_page((int)pagemap, mapped.buf, (uint64_t)mapped.len);
        Py_END_ALLOW_THREADS
    } else { /* some microseconds a MiB */
        changed = ndm_i_is_changed((int)pagemap, mapped.buf, (uint64_t)mapped.len);
    }
    PyBuffer_Release(&mapped);
    return changed < 0 ? Py_NewRef(Py_None) : PyBool_FromLong(changed);
}

PyMethodDef ndm_i_comparing[] = {
    {"address_of", address_of, METH_O, NULL},
    NDM_I_VERB("is_at", is_at),
    NDM_I_VERB("has_changed", has_changed),
    {NULL, NULL, 0, NULL},
};
