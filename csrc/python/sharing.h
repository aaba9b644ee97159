/* The verbs of sharing.c: what a reader does with the values of another owner's region. */
#ifndef NDM_PYTHON_SHARING_H
#define NDM_PYTHON_SHARING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

extern PyMethodDef ndm_i_sharing[];

#endif
