/* See contents.h. */
#include "contents.h"

#include <string.h>

static void refuse_pointers(const char *what, PyObject *kind)
{
    if (kind)
        PyErr_Format(PyExc_TypeError,
                     "the bytes of %s of %R are pointers, not values: store what they lead to (pickle.dumps(), or an array "
                     "without objects, such as one of text of fixed width)",
                     what, kind);
}

/* ---- arrays of NumPy ------------------------------------------------------------------------------------ */

/* A type of a module that is imported already: an object of the type cannot be there before. Kept once found; NULL until
 * then, without an exception unless looking failed. */
static PyObject *type_in(const char *module, const char *name, PyObject **kept)
{
    if (*kept)
        return *kept;
    PyObject *text = PyUnicode_FromString(module);
    PyObject *found = text ? PyImport_GetModule(text) : NULL;
    PyObject *type = found ? PyObject_GetAttrString(found, name) : NULL;
    if (type && PyType_Check(type))
        *kept = Py_NewRef(type);
    Py_XDECREF(type);
    Py_XDECREF(found);
    Py_XDECREF(text);
    if (PyErr_Occurred() && (PyErr_ExceptionMatches(PyExc_AttributeError) || PyErr_ExceptionMatches(PyExc_ImportError)))
        PyErr_Clear(); /* a module in the middle of its import */
    return *kept;
}

static bool is_a(PyObject *object, PyObject *type)
{
    return type && (Py_TYPE(object) == (PyTypeObject *)type || PyType_IsSubtype(Py_TYPE(object), (PyTypeObject *)type));
}

/* The attributes tell, and at the same price for each type of elements: NumPy names no format for dates and strings. */
static bool holds_objects(PyObject *array)
{
    static PyObject *plain; /* the last one without objects: most arrays in a row are alike */
    static PyObject *dtype_name, *hasobject_name;
    if (!dtype_name && !(dtype_name = PyUnicode_InternFromString("dtype")))
        return true;
    if (!hasobject_name && !(hasobject_name = PyUnicode_InternFromString("hasobject")))
        return true;
    PyObject *dtype = PyObject_GetAttr(array, dtype_name);
    if (!dtype)
        return true;
    bool holds = false;
    if (dtype != plain) {
        PyObject *answer = PyObject_GetAttr(dtype, hasobject_name);
        holds = answer != Py_False;
        if (holds && answer)
            refuse_pointers("an array", dtype);
        Py_XDECREF(answer);
        if (!holds) {
            PyObject *before = plain;
            plain = Py_NewRef(dtype);
            Py_XDECREF(before);
        }
    }
    Py_DECREF(dtype);
    return holds;
}

static bool array_holds_values(PyObject *array, bool exact)
{
    static PyObject *masked;
    if (!exact && !type_in("numpy.ma", "MaskedArray", &masked) && PyErr_Occurred())
        return false;
    if (!exact && is_a(array, masked)) {
        PyErr_SetString(PyExc_TypeError, "the mask of a masked array is not in its buffer: give array.data, and array.mask "
                                         "beside it, or array.filled()");
        return false;
    }
    return !holds_objects(array);
}

/* ---- all other buffers ---------------------------------------------------------------------------------- */

/* Does a format, of the struct module and PEP 3118, name objects or pointers? Names of fields stand between colons. */
static bool names_pointers(const char *format)
{
    for (const char *at = format; at && *at; at++) {
        if (*at == ':') {
            const char *end = strchr(at + 1, ':');
            if (!end)
                return false;
            at = end;
        } else if (*at == 'Z' && at[1] && strchr("fdg", at[1])) {
            at++; /* a complex number; Z alone is ctypes' pointer to text */
        } else if (strchr("OPzZ&X", *at)) {
            return true;
        }
    }
    return false;
}

bool ndm_i_holds_values(PyObject *object)
{
    static PyObject *ndarray;
    if (PyBytes_CheckExact(object) || PyByteArray_CheckExact(object))
        return true;
    if (!PyMemoryView_Check(object)) {
        PyObject *type = type_in("numpy", "ndarray", &ndarray);
        if (!type && PyErr_Occurred())
            return false;
        if (is_a(object, type))
            return array_holds_values(object, (PyObject *)Py_TYPE(object) == type);
    }
    Py_buffer buffer;
    if (PyObject_GetBuffer(object, &buffer, PyBUF_FULL_RO) != 0) {
        if (!PyErr_ExceptionMatches(PyExc_TypeError) && !PyErr_ExceptionMatches(PyExc_BufferError))
            return false;
        PyErr_Clear(); /* the next to ask for the buffer reports it */
        return true;
    }
    const bool holds = !names_pointers(buffer.format);
    if (!holds) {
        PyObject *format = PyUnicode_FromString(buffer.format);
        refuse_pointers("a buffer", format);
        Py_XDECREF(format);
    }
    PyBuffer_Release(&buffer);
    return holds;
}

PyObject *ndm_i_check_contents(PyObject *Py_UNUSED(module), PyObject *object)
{
    return ndm_i_holds_values(object) ? Py_NewRef(Py_None) : NULL;
}
