/* nodedb_mem._memory: the data plane, whatever a value's bytes or its slot's number pass through. A file here holds one
 * kind of verb each. The core is called without the GIL, but for a read that need not wait. */
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
    PyModuleDef_HEAD_INIT, .m_name = "nodedb_mem._memory", .m_size = -1, .m_methods = functions};

static int add_verbs(PyObject *module)
{
    PyMethodDef *const tables[] = {ndm_i_opening, ndm_i_writing, ndm_i_reading, ndm_i_slots, ndm_i_sharing,
                                   ndm_i_governing};
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++)
        if (PyModule_AddFunctions(module, tables[i]) < 0)
            return -1;
    return 0;
}

PyMODINIT_FUNC PyInit__memory(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module && (ndm_i_objects_init() < 0 || add_verbs(module) < 0 || ndm_i_governing_init(module) < 0))
        Py_CLEAR(module);
    return module;
}
