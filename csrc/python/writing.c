/* Writing: one value, many, one of several parts, or room that is filled in place. A slot that cannot be handed to
 * Python is freed again. */
#include "writing.h"

#include "arguments.h"
#include "objects.h"
#include "refusals.h"

#include <stdlib.h>

/* ---- results -------------------------------------------------------------------------------------------- */

static PyObject *list_of_numbers(const int64_t *numbers, Py_ssize_t count)
{
    PyObject *list = PyList_New(count);
    for (Py_ssize_t i = 0; list && i < count; i++) {
        PyObject *number = PyLong_FromLongLong(numbers[i]);
        if (!number)
            Py_CLEAR(list);
        else
            PyList_SetItem(list, i, number);
    }
    return list;
}

/* A slot that was just written: its number, and what else there is to give; freed again where that cannot be had. Takes
 * the reference to `more`, which is NULL with an exception, or None for nothing. */
static PyObject *written(ndm_region *region, int64_t slot, PyObject *more)
{
    PyObject *number = more ? PyLong_FromLongLong(slot) : NULL, *result = NULL;
    if (number)
        result = more == Py_None ? Py_NewRef(number) : PyTuple_Pack(2, number, more);
    Py_XDECREF(number);
    Py_XDECREF(more);
    if (!result) {
        Py_BEGIN_ALLOW_THREADS
        ndm_region_free(region, slot);
        Py_END_ALLOW_THREADS
    }
    return result;
}

/* ---- one value ------------------------------------------------------------------------------------------ */

/* write(region, data, engine) -> slot */
static PyObject *write_value(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    Py_buffer data;
    int64_t engine, slot;
    ndm_error refusal;
    ndm_region *region;
    if (!ndm_i_has_count(count, 3) || !(region = ndm_i_held_region(arguments[0])) ||
        !ndm_i_get_number(arguments[2], &engine) || !ndm_i_get_data(arguments[1], &data))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    slot = ndm_i_noted(ndm_region_write(region, data.buf, (uint64_t)data.len, engine), &refusal);
    Py_END_ALLOW_THREADS
    PyObject *result =
        slot < 0 ? ndm_i_refuse(arguments[0], NULL, &refusal) : written(region, slot, Py_NewRef(Py_None));
    ndm_i_let_go(&data);
    return result;
}

/* What tells one value from a later one in the same slot, and the sizes of its parts. */
static PyObject *layout(uint32_t generation, const ndm_i_gathered *all)
{
    PyObject *sizes = list_of_numbers((const int64_t *)all->sizes, all->count);
    return sizes ? Py_BuildValue("kN", (unsigned long)generation, sizes) : NULL;
}

/* write_vectored(region, buffers, engine, aligned) -> slot, (generation, list of sizes) */
static PyObject *write_vectored(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    ndm_i_gathered all;
    int64_t engine, aligned, slot;
    ndm_slot facts = {0};
    ndm_error refusal;
    PyObject *result = NULL;
    ndm_region *region;
    if (!ndm_i_has_count(count, 4) || !(region = ndm_i_held_region(arguments[0])) ||
        !ndm_i_get_number(arguments[2], &engine) || !ndm_i_get_number(arguments[3], &aligned))
        return NULL;
    if (ndm_i_gather(arguments[1], &all)) {
        Py_BEGIN_ALLOW_THREADS
        slot = ndm_region_write_vectored(region, all.parts, all.sizes, (uint64_t)all.count, aligned != 0, engine);
        if (ndm_i_noted(slot, &refusal) >= 0)
            ndm_region_slot(region, slot, &facts);
        Py_END_ALLOW_THREADS
        result = slot < 0 ? ndm_i_refuse(arguments[0], NULL, &refusal)
                          : written(region, slot, layout(facts.generation, &all));
    }
    ndm_i_gathered_free(&all);
    return result;
}

/* ---- in place ------------------------------------------------------------------------------------------- */

/* allocate(region, size, engine) -> slot, memoryview */
static PyObject *allocate(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    int64_t size, engine, slot;
    char *address = NULL;
    ndm_error refusal;
    ndm_region *region;
    View *view;
    if (!ndm_i_has_count(count, 3) || !(region = ndm_i_held_region(arguments[0])) ||
        !ndm_i_get_number(arguments[1], &size) || !ndm_i_get_number(arguments[2], &engine) ||
        !(view = ndm_i_view_new(true)))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    slot = ndm_i_noted(ndm_region_allocate(region, (uint64_t)size, engine, &address), &refusal);
    Py_END_ALLOW_THREADS
    if (slot < 0) {
        Py_DECREF(view);
        return ndm_i_refuse(arguments[0], NULL, &refusal);
    }
    view->address = address;
    view->size = (uint64_t)size;
    return written(region, slot, ndm_i_view_memory(view));
}

/* commit(region, slot) */
static PyObject *commit(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    int64_t slot, status;
    ndm_error refusal;
    ndm_region *region;
    if (!ndm_i_has_count(count, 2) || !(region = ndm_i_held_region(arguments[0])) ||
        !ndm_i_get_slot(arguments[1], &slot))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = ndm_i_noted(ndm_region_commit(region, slot), &refusal);
    Py_END_ALLOW_THREADS
    if (status < 0)
        return ndm_i_refuse(arguments[0], arguments[1], &refusal);
    Py_RETURN_NONE;
}

/* ---- many values ---------------------------------------------------------------------------------------- */

/* write_many(region, buffers, engine) -> list of slots */
static PyObject *write_many(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    ndm_i_gathered all;
    int64_t engine, status, *slots = NULL;
    ndm_error refusal;
    PyObject *result = NULL;
    ndm_region *region;
    if (!ndm_i_has_count(count, 3) || !(region = ndm_i_held_region(arguments[0])) ||
        !ndm_i_get_number(arguments[2], &engine))
        return NULL;
    if (!ndm_i_gather(arguments[1], &all))
        goto end;
    if (!(slots = calloc((size_t)all.count, sizeof *slots))) {
        PyErr_NoMemory();
        goto end;
    }
    Py_BEGIN_ALLOW_THREADS
    status = ndm_region_write_many(region, all.parts, all.sizes, (uint64_t)all.count, engine, slots);
    ndm_i_noted(status, &refusal);
    Py_END_ALLOW_THREADS
    if (status < 0) {
        ndm_i_refuse(arguments[0], NULL, &refusal);
    } else if (!(result = list_of_numbers(slots, all.count))) {
        Py_BEGIN_ALLOW_THREADS
        ndm_region_free_many(region, slots, (uint64_t)all.count);
        Py_END_ALLOW_THREADS
    }

end:
    free(slots);
    ndm_i_gathered_free(&all);
    return result;
}

/* total + length; takes the reference to `total`, which may be NULL with an exception, as may what it gives. */
static PyObject *plus(PyObject *total, int64_t length)
{
    PyObject *number = total ? PyLong_FromLongLong(length) : NULL;
    PyObject *sum = number ? PyNumber_Add(total, number) : NULL;
    Py_XDECREF(number);
    Py_XDECREF(total);
    return sum;
}

/* Raise what is wrong with lengths that the core has refused. False, without an exception, if nothing is. */
static bool refuse_lengths(const ndm_i_numbers *lengths, Py_ssize_t size)
{
    PyObject *total = PyLong_FromLong(0);
    for (Py_ssize_t i = 0; total && i < lengths->count; i++) {
        if (lengths->at[i] < 0) {
            PyErr_Format(PyExc_ValueError, "lengths[%zd] is negative: %lld", i, (long long)lengths->at[i]);
            Py_DECREF(total);
            return true;
        }
        total = plus(total, lengths->at[i]);
    }
    int overflow = 0;
    const bool wrong = !total || PyLong_AsLongLongAndOverflow(total, &overflow) != size || overflow != 0;
    if (total && wrong)
        PyErr_Format(PyExc_ValueError, "the lengths add up to %S bytes, the buffer has %zd", total, size);
    Py_XDECREF(total);
    return wrong;
}

/* write_packed(region, data, buffer of lengths, engine, buffer for the slots) */
static PyObject *write_packed(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    Py_buffer data;
    ndm_i_numbers lengths, slots;
    int64_t engine, status = -1;
    ndm_error refusal;
    ndm_region *region;
    if (!ndm_i_has_count(count, 5) || !(region = ndm_i_held_region(arguments[0])) ||
        !ndm_i_get_number(arguments[3], &engine) || !ndm_i_get_numbers(arguments[2], &lengths))
        return NULL;
    if (!ndm_i_get_room(arguments[4], &slots, lengths.count))
        goto end_lengths;
    if (!ndm_i_get_data(arguments[1], &data))
        goto end_slots;
    Py_BEGIN_ALLOW_THREADS
    status = ndm_region_write_packed(region, data.buf, (uint64_t)data.len, lengths.at, (uint64_t)lengths.count, engine,
                                     slots.at);
    ndm_i_noted(status, &refusal);
    Py_END_ALLOW_THREADS
    if (status < 0 && (status != NDM_ERR_ARGUMENT || !refuse_lengths(&lengths, data.len)))
        ndm_i_refuse(arguments[0], NULL, &refusal);
    ndm_i_let_go(&data);

end_slots:
    PyBuffer_Release(&slots.buffer);
end_lengths:
    PyBuffer_Release(&lengths.buffer);
    return status < 0 ? NULL : Py_NewRef(Py_None);
}

PyMethodDef ndm_i_writing[] = {
    NDM_I_VERB("write", write_value),
    NDM_I_VERB("write_vectored", write_vectored),
    NDM_I_VERB("allocate", allocate),
    NDM_I_VERB("commit", commit),
    NDM_I_VERB("write_many", write_many),
    NDM_I_VERB("write_packed", write_packed),
    {NULL, NULL, 0, NULL},
};
