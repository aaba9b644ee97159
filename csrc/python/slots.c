/* Slots by their numbers: free, describe, share, evict, prefetch. No byte of a value passes here. */
#include "slots.h"

#include "arguments.h"
#include "objects.h"
#include "refusals.h"

/* Every verb of one slot takes: region, slot. */
static ndm_region *get_slot_of(PyObject *const *arguments, Py_ssize_t count, int64_t *slot)
{
    ndm_region *region;
    if (!ndm_i_has_count(count, 2) || !(region = ndm_i_held_region(arguments[0])) ||
        !ndm_i_get_slot(arguments[1], slot))
        return NULL;
    return region;
}

/* free(region, slot) */
static PyObject *free_value(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    int64_t slot, status;
    ndm_error refusal;
    ndm_region *region = get_slot_of(arguments, count, &slot);
    if (!region)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = ndm_i_noted(ndm_region_free(region, slot), &refusal);
    Py_END_ALLOW_THREADS
    if (status < 0)
        return ndm_i_refuse(arguments[0], arguments[1], &refusal);
    Py_RETURN_NONE;
}

/* The first number that has come before; NULL with an exception. */
static PyObject *first_repeated(const ndm_i_numbers *slots)
{
    PyObject *seen = PySet_New(NULL), *number = NULL;
    int found = seen ? 0 : -1;
    for (Py_ssize_t i = 0; found == 0 && i < slots->count; i++) {
        Py_XDECREF(number);
        number = PyLong_FromLongLong(slots->at[i]);
        if (!number || (found = PySet_Contains(seen, number)) < 0 || (found == 0 && PySet_Add(seen, number) < 0))
            found = -1;
    }
    Py_XDECREF(seen);
    if (found > 0)
        return number;
    Py_XDECREF(number);
    if (found == 0)
        PyErr_SetString(PyExc_SystemError, "nodedb_mem: no slot is listed twice");
    return NULL;
}

/* free_many(region, buffer of slots) */
static PyObject *free_many(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    ndm_i_numbers slots;
    int64_t status;
    ndm_error refusal;
    PyObject *repeated = NULL;
    ndm_region *region;
    if (!ndm_i_has_count(count, 2) || !(region = ndm_i_held_region(arguments[0])) ||
        !ndm_i_get_numbers(arguments[1], &slots))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = ndm_i_noted(ndm_region_free_many(region, slots.at, (uint64_t)slots.count), &refusal);
    Py_END_ALLOW_THREADS
    if (status == NDM_ERR_ARGUMENT)
        repeated = first_repeated(&slots);
    if (status < 0 && (repeated || status != NDM_ERR_ARGUMENT))
        ndm_i_refuse(arguments[0], repeated, &refusal);
    Py_XDECREF(repeated);
    PyBuffer_Release(&slots.buffer);
    return status < 0 ? NULL : Py_NewRef(Py_None);
}

/* slot(region, slot) -> offset, size, engine, occupied, generation */
static PyObject *describe(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    int64_t slot, status;
    ndm_slot facts;
    ndm_error refusal;
    ndm_region *region = get_slot_of(arguments, count, &slot);
    if (!region)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = ndm_i_noted(ndm_region_slot(region, slot, &facts), &refusal);
    Py_END_ALLOW_THREADS
    if (status < 0)
        return ndm_i_refuse(arguments[0], arguments[1], &refusal);
    return Py_BuildValue("KKiOk", (unsigned long long)facts.offset, (unsigned long long)facts.size, (int)facts.engine,
                         facts.occupied ? Py_True : Py_False, (unsigned long)facts.generation);
}

/* contains(region, slot) -> bool */
static PyObject *contains(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    int64_t slot, status;
    ndm_error refusal;
    ndm_region *region = get_slot_of(arguments, count, &slot);
    if (!region)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = ndm_i_noted(ndm_region_contains(region, slot), &refusal);
    Py_END_ALLOW_THREADS
    return status < 0 ? ndm_i_refuse(arguments[0], arguments[1], &refusal) : PyBool_FromLong((long)status);
}

/* share(region, slot) -> descriptors of data, slots and leases, generation, incarnation */
static PyObject *share(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    int64_t slot, status;
    ndm_shared shared;
    ndm_error refusal;
    ndm_region *region = get_slot_of(arguments, count, &slot);
    if (!region)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = ndm_i_noted(ndm_region_share(region, slot, &shared), &refusal);
    Py_END_ALLOW_THREADS
    if (status < 0)
        return ndm_i_refuse(arguments[0], arguments[1], &refusal);
    return Py_BuildValue("iiikK", (int)shared.data, (int)shared.slots, (int)shared.leases,
                         (unsigned long)shared.generation, (unsigned long long)shared.incarnation);
}

/* evict(region, buffer of slots, or None for all) */
static PyObject *evict(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    ndm_i_numbers slots = {.at = NULL};
    int64_t status;
    ndm_error refusal;
    ndm_region *region;
    if (!ndm_i_has_count(count, 2) || !(region = ndm_i_held_region(arguments[0])))
        return NULL;
    const bool all = arguments[1] == Py_None;
    if (!all && !ndm_i_get_numbers(arguments[1], &slots))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = ndm_i_noted(ndm_region_evict(region, slots.at, (uint64_t)slots.count), &refusal);
    Py_END_ALLOW_THREADS
    if (!all)
        PyBuffer_Release(&slots.buffer);
    if (status < 0)
        return ndm_i_refuse(arguments[0], NULL, &refusal);
    Py_RETURN_NONE;
}

/* prefetch(region, buffer of slots) */
static PyObject *prefetch(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    ndm_i_numbers slots;
    int64_t status;
    ndm_error refusal;
    ndm_region *region;
    if (!ndm_i_has_count(count, 2) || !(region = ndm_i_held_region(arguments[0])) ||
        !ndm_i_get_numbers(arguments[1], &slots))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = ndm_i_noted(ndm_region_prefetch(region, slots.at, (uint64_t)slots.count), &refusal);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&slots.buffer);
    if (status < 0)
        return ndm_i_refuse(arguments[0], NULL, &refusal);
    Py_RETURN_NONE;
}

PyMethodDef ndm_i_slots[] = {
    NDM_I_VERB("free", free_value),
    NDM_I_VERB("free_many", free_many),
    NDM_I_VERB("slot", describe),
    NDM_I_VERB("contains", contains),
    NDM_I_VERB("share", share),
    NDM_I_VERB("evict", evict),
    NDM_I_VERB("prefetch", prefetch),
    {NULL, NULL, 0, NULL},
};
