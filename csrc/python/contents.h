/* Is a buffer the whole of what an object holds? The bytes of pointers are worth nothing once the objects that they lead to
 * are gone, and bytes copied onto them lead anywhere. The mask of a masked array lies outside its buffer. */
#ifndef NDM_PYTHON_CONTENTS_H
#define NDM_PYTHON_CONTENTS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>

/* False, with a TypeError, if the object's buffer is pointers, or leaves a mask out. True also for what has no buffer. */
bool ndm_i_holds_values(PyObject *object);

/* check_contents(object): the same as a function of the module, which raises the TypeError. */
PyObject *ndm_i_check_contents(PyObject *module, PyObject *object);

#endif
