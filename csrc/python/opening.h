/* The verbs of opening.c: open a region, open a reader. */
#ifndef NDM_PYTHON_OPENING_H
#define NDM_PYTHON_OPENING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

extern PyMethodDef ndm_i_opening[];

#endif
