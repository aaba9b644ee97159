/* The verbs of slots.c: what a region does with the numbers of slots. */
#ifndef NDM_PYTHON_SLOTS_H
#define NDM_PYTHON_SLOTS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

extern PyMethodDef ndm_i_slots[];

#endif
