/* Views and copies of values, a region's and a reader's. */
#include "results.h"

#include "refusals.h"
#include "waiting.h"

#include <stdlib.h>

PyObject *ndm_i_viewed(View *view, const char *address, uint64_t size, PyObject *holder, PyObject *slot,
                       const ndm_error *refusal)
{
    if (!address) {
        Py_DECREF(view);
        return ndm_i_refuse(holder, slot, refusal);
    }
    view->address = address;
    view->size = size;
    return ndm_i_view_memory(view);
}

/* The list is made when all are there: a collection on the way would show it to others, half empty. */
PyObject *ndm_i_list_of_views(const char **addresses, const uint64_t *sizes, Py_ssize_t count)
{
    PyObject **memories = calloc((size_t)count + 1, sizeof *memories), *list = NULL;
    Py_ssize_t made = 0, taken = 0;
    if (!memories)
        PyErr_NoMemory();
    while (memories && taken < count) {
        View *view = ndm_i_view_new(false);
        if (!view)
            break;
        view->address = addresses[taken];
        view->size = sizes[taken++];
        PyObject *memory = ndm_i_view_memory(view);
        if (!memory)
            break;
        memories[made++] = memory;
    }
    if (memories && made == count && (list = PyList_New(count)))
        for (; made > 0; made--)
            PyList_SetItem(list, made - 1, memories[made - 1]);
    while (made > 0)
        Py_DECREF(memories[--made]);
    while (taken < count)
        ndm_view_release(addresses[taken++]);
    free(memories);
    return list;
}

int64_t ndm_i_copy(const ndm_i_source *from, void *buffer, int64_t room, ndm_error *refusal)
{
    int64_t size;
    ndm_i_wait wait = {0};
    do {
        Py_BEGIN_ALLOW_THREADS
        size = from->region ? ndm_region_read_into(from->region, from->slot, buffer, (uint64_t)room)
                            : ndm_reader_copy(from->reader, from->slot, from->generation, buffer, (uint64_t)room);
        ndm_i_noted(size, refusal);
        Py_END_ALLOW_THREADS
    } while (size == NDM_ERR_WAIT && ndm_i_go_on(&wait, refusal, NDM_ERR_STALE));
    return size;
}

PyObject *ndm_i_loaded(int64_t total, Py_ssize_t room, PyObject *holder, const ndm_error *refusal)
{
    if (total < 0)
        return ndm_i_refuse(holder, NULL, refusal);
    if (total > room)
        return PyErr_Format(PyExc_ValueError, "the values have %lld bytes, the buffer has room for %zd", (long long)total, room);
    return Py_NewRef(Py_None);
}

PyObject *ndm_i_bytes_of(const ndm_i_source *from, PyObject *holder, PyObject *slot)
{
    char small[4096];
    ndm_error refusal;
    int64_t room = from->region ? 512 : (int64_t)sizeof small; /* a second look costs a reader more than a second copy */
    int64_t size = ndm_i_copy(from, small, room, &refusal);
    PyObject *bytes = NULL, *result = NULL;
    while (size > room) { /* again where a larger value has come meanwhile */
        Py_XDECREF(bytes);
        bytes = NULL;
        if (PyErr_CheckSignals() != 0)
            return NULL;
        if (!(bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size)))
            return NULL;
        room = size;
        size = ndm_i_copy(from, PyBytes_AsString(bytes), room, &refusal);
    }
    if (size < 0)
        ndm_i_refuse(holder, slot, &refusal);
    else if (bytes && size == room)
        result = Py_NewRef(bytes);
    else
        result = PyBytes_FromStringAndSize(bytes ? PyBytes_AsString(bytes) : small, (Py_ssize_t)size);
    Py_XDECREF(bytes);
    return result;
}
