/* The verbs of comparing.c: whether bytes are what they were. */
#ifndef NDM_PYTHON_COMPARING_H
#define NDM_PYTHON_COMPARING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

extern PyMethodDef ndm_i_comparing[];

#endif
