/* The verbs of reading.c: what gives the bytes of a region's values. */
#ifndef NDM_PYTHON_READING_H
#define NDM_PYTHON_READING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

extern PyMethodDef ndm_i_reading[];

#endif
