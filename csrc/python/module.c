/* nodedb_mem._memory: the data plane, whatever a value's bytes or its slot's number pass through. A file here holds one
 * kind of verb each. The core is called without the GIL, but for a read that need not wait. */
#include "comparing.h"
#include "contents.h"
#include "governing.h"
#include "objects.h"
#include "opening.h"
#include "reading.h"
#include "refusals.h"
#include "sharing.h"
#include "slots.h"
#include "writing.h"

static PyMethodDef functions[] = {
    {"translate_with", ndm_i_translate_with, METH_O, NULL},
    {"check_contents", ndm_i_check_contents, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "nodedb_mem._memory", .m_size = 0, .m_methods = functions};

static int add_verbs(PyObject *module)
{
    PyMethodDef *const tables[] = {ndm_i_opening, ndm_i_writing, ndm_i_reading,  ndm_i_slots,
                                   ndm_i_sharing, ndm_i_comparing, ndm_i_governing};
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++)
        if (PyModule_AddFunctions(module, tables[i]) < 0)
            return -1;
    return 0;
}

static PyObject *make_module(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module && (ndm_i_objects_init() < 0 || add_verbs(module) < 0 || ndm_i_governing_init(module) < 0))
        Py_CLEAR(module);
    return module;
}

/* The types and the translator are objects of one interpreter: another of the process would use them, and replace them. The
 * size of 0 has Python ask here each time; who imports again in the same interpreter gets the same module. */
PyMODINIT_FUNC PyInit__memory(void)
{
    static PyObject *kept;
    static int64_t home;
    const int64_t here = PyInterpreterState_GetID(PyInterpreterState_Get());
    if (kept && here != home) {
        PyErr_SetString(PyExc_ImportError, "nodedb_mem serves one interpreter of a process, and another has imported it: use "
                                           "it there, or in a process of its own");
        return NULL;
    }
    home = here;
    if (!kept)
        kept = make_module();
    return Py_XNewRef(kept);
}
