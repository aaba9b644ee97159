/* Python's arguments, as the core takes them. What gives a bool gives false with an exception set. */
#ifndef NDM_PYTHON_ARGUMENTS_H
#define NDM_PYTHON_ARGUMENTS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stdint.h>

/* An entry of a module's table, for a function with the arguments of METH_FASTCALL. */
#define NDM_I_VERB(name, function) {name, (PyCFunction)(void (*)(void))(function), METH_FASTCALL, NULL}

bool ndm_i_has_count(Py_ssize_t given, Py_ssize_t wanted);

/* A slot number; one that no int64_t holds becomes one that no slot has. */
bool ndm_i_get_slot(PyObject *object, int64_t *slot);

bool ndm_i_get_number(PyObject *object, int64_t *number);

/* The memory of a value, or of room for one. As PyObject_GetBuffer(), but what is not contiguous is always a BufferError,
 * and what is not all there is to the object is a TypeError (contents.h). */
bool ndm_i_get_buffer(PyObject *object, Py_buffer *buffer, int flags);

/* The memory of a value, until ndm_i_let_go(). What cannot change needs no export: `buffer->obj` is NULL then, and the
 * caller has to hold the object. */
bool ndm_i_get_data(PyObject *object, Py_buffer *buffer);
void ndm_i_let_go(Py_buffer *buffer);

/* A buffer of int64 that nobody else writes to meanwhile, until PyBuffer_Release(). */
typedef struct {
    Py_buffer buffer;
    int64_t *at;
    Py_ssize_t count;
} ndm_i_numbers;

bool ndm_i_get_numbers(PyObject *object, ndm_i_numbers *numbers);

/* The same, to be written to, with room for `count` numbers. */
bool ndm_i_get_room(PyObject *object, ndm_i_numbers *numbers, Py_ssize_t count);

/* The memory of many values, and references to them that nobody else can take away. */
typedef struct {
    PyObject *values; /* a tuple */
    Py_ssize_t count, got;
    Py_buffer *buffers;
    const void **parts;
    uint64_t *sizes;
} ndm_i_gathered;

/* Of any iterable that gives one or more. To be given to ndm_i_gathered_free() in any case. */
bool ndm_i_gather(PyObject *iterable, ndm_i_gathered *all);
void ndm_i_gathered_free(ndm_i_gathered *all);

#endif
