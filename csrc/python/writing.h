/* The verbs of writing.c: what puts values into a region. */
#ifndef NDM_PYTHON_WRITING_H
#define NDM_PYTHON_WRITING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

extern PyMethodDef ndm_i_writing[];

#endif
