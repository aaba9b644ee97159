/* Reading: views of a region's values, which end with the last object made from them, and copies. */
#include "reading.h"

#include "arguments.h"
#include "objects.h"
#include "refusals.h"
#include "results.h"

#include <stdlib.h>

/* ---- views ---------------------------------------------------------------------------------------------- */

/* read(region, slot) -> memoryview */
static PyObject *read_value(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    int64_t slot;
    uint64_t size = 0;
    const char *address = NULL;
    ndm_error refusal;
    ndm_region *region;
    View *view;
    if (!ndm_i_has_count(count, 2) || !(region = ndm_i_held_region(arguments[0])) ||
        !ndm_i_get_slot(arguments[1], &slot) || !(view = ndm_i_view_new(false)))
        return NULL;
    const int status = ndm_region_try_read(region, slot, &address, &size);
    if (status == NDM_ERR_WAIT) {
        Py_BEGIN_ALLOW_THREADS
        address = ndm_region_read(region, slot, &size);
        ndm_i_noted(address ? NDM_OK : -1, &refusal);
        Py_END_ALLOW_THREADS
    } else {
        ndm_i_noted(status, &refusal);
    }
    return ndm_i_viewed(view, address, size, arguments[0], arguments[1], &refusal);
}

/* restore(region, slot) -> memoryview */
static PyObject *restore(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    int64_t slot;
    uint64_t size = 0;
    const char *address;
    ndm_error refusal;
    ndm_region *region;
    View *view;
    if (!ndm_i_has_count(count, 2) || !(region = ndm_i_held_region(arguments[0])) ||
        !ndm_i_get_slot(arguments[1], &slot) || !(view = ndm_i_view_new(true)))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    address = ndm_region_restore(region, slot, &size);
    ndm_i_noted(address ? NDM_OK : -1, &refusal);
    Py_END_ALLOW_THREADS
    return ndm_i_viewed(view, address, size, arguments[0], arguments[1], &refusal);
}

/* read_many(region, buffer of slots) -> list of memoryviews */
static PyObject *read_many(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    ndm_i_numbers slots;
    ndm_error refusal;
    ndm_region *region;
    if (!ndm_i_has_count(count, 2) || !(region = ndm_i_held_region(arguments[0])) ||
        !ndm_i_get_numbers(arguments[1], &slots))
        return NULL;
    PyObject *result = NULL;
    const char **addresses = calloc((size_t)slots.count + 1, sizeof *addresses);
    uint64_t *sizes = calloc((size_t)slots.count + 1, sizeof *sizes);
    if (addresses && sizes) {
        int64_t status;
        Py_BEGIN_ALLOW_THREADS
        status = ndm_region_read_many(region, slots.at, (uint64_t)slots.count, addresses, sizes);
        ndm_i_noted(status, &refusal);
        Py_END_ALLOW_THREADS
        result = status < 0 ? ndm_i_refuse(arguments[0], NULL, &refusal)
                            : ndm_i_list_of_views(addresses, sizes, slots.count);
    } else {
        PyErr_NoMemory();
    }
    free(addresses);
    free(sizes);
    PyBuffer_Release(&slots.buffer);
    return result;
}

/* ---- copies --------------------------------------------------------------------------------------------- */

/* read_bytes(region, slot) -> bytes */
static PyObject *read_bytes(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    ndm_i_source from = {.generation = -1};
    if (!ndm_i_has_count(count, 2) || !(from.region = ndm_i_held_region(arguments[0])) ||
        !ndm_i_get_slot(arguments[1], &from.slot))
        return NULL;
    return ndm_i_bytes_of(&from, arguments[0], arguments[1]);
}

/* read_into(region, slot, buffer) -> size */
static PyObject *read_into(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    ndm_i_source from = {.generation = -1};
    ndm_error refusal;
    Py_buffer target;
    if (!ndm_i_has_count(count, 3) || !(from.region = ndm_i_held_region(arguments[0])) ||
        !ndm_i_get_slot(arguments[1], &from.slot) || !ndm_i_get_buffer(arguments[2], &target, PyBUF_WRITABLE))
        return NULL;
    PyObject *result = NULL;
    const int64_t size = ndm_i_copy(&from, target.buf, target.len, &refusal);
    if (size < 0)
        ndm_i_refuse(arguments[0], arguments[1], &refusal);
    else if (size > target.len)
        PyErr_Format(PyExc_ValueError, "slot %lld holds %lld bytes, the buffer has room for %zd", (long long)from.slot,
                     (long long)size, target.len);
    else
        result = PyLong_FromLongLong(size);
    PyBuffer_Release(&target);
    return result;
}

/* read_many_into(region, buffer of slots, buffer, buffer for the sizes) */
static PyObject *read_many_into(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    Py_buffer target;
    ndm_i_numbers slots, sizes;
    ndm_error refusal;
    PyObject *result = NULL;
    ndm_region *region;
    if (!ndm_i_has_count(count, 4) || !(region = ndm_i_held_region(arguments[0])) ||
        !ndm_i_get_numbers(arguments[1], &slots))
        return NULL;
    if (!ndm_i_get_room(arguments[3], &sizes, slots.count))
        goto end_slots;
    if (!ndm_i_get_buffer(arguments[2], &target, PyBUF_WRITABLE))
        goto end_sizes;
    int64_t total;
    Py_BEGIN_ALLOW_THREADS
    total = ndm_region_load_many(region, slots.at, (uint64_t)slots.count, target.buf, (uint64_t)target.len, sizes.at);
    ndm_i_noted(total, &refusal);
    Py_END_ALLOW_THREADS
    result = ndm_i_loaded(total, target.len, arguments[0], &refusal);
    PyBuffer_Release(&target);

end_sizes:
    PyBuffer_Release(&sizes.buffer);
end_slots:
    PyBuffer_Release(&slots.buffer);
    return result;
}

PyMethodDef ndm_i_reading[] = {
    NDM_I_VERB("read", read_value),
    NDM_I_VERB("restore", restore),
    NDM_I_VERB("read_many", read_many),
    NDM_I_VERB("read_bytes", read_bytes),
    NDM_I_VERB("read_into", read_into),
    NDM_I_VERB("read_many_into", read_many_into),
    {NULL, NULL, 0, NULL},
};
