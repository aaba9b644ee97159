/* A reader's verbs: values of a region that another thread or process owns, and may free or move meanwhile. */
#include "sharing.h"

#include "arguments.h"
#include "objects.h"
#include "refusals.h"
#include "results.h"
#include "waiting.h"

#include <stdlib.h>

/* Every verb of one value takes: reader, slot, generation (-1: any). */
static bool get_shared(PyObject *const *arguments, Py_ssize_t count, ndm_i_source *from)
{
    from->region = NULL;
    return ndm_i_has_count(count, 3) && (from->reader = ndm_i_held_reader(arguments[0])) &&
           ndm_i_get_slot(arguments[1], &from->slot) && ndm_i_get_number(arguments[2], &from->generation);
}

/* What a borrow has to know in the end. In a capsule, because the core trusts the slot in it. */
typedef struct {
    PyObject *holder;
    ndm_value value;
} loan;

static const char loan_name[] = "nodedb_mem._memory.loan";

static void loan_free(PyObject *capsule)
{
    loan *kept = PyCapsule_GetPointer(capsule, loan_name);
    Py_DECREF(kept->holder);
    free(kept);
}

/* ---- views and copies ----------------------------------------------------------------------------------- */

static PyObject *view_shared(PyObject *const *arguments, Py_ssize_t count, ndm_value *value)
{
    ndm_i_source from;
    const char *address;
    ndm_error refusal;
    ndm_i_wait wait = {0};
    View *view;
    if (!get_shared(arguments, count, &from) || !(view = ndm_i_view_new(false)))
        return NULL;
    do {
        Py_BEGIN_ALLOW_THREADS
        address = ndm_reader_read(from.reader, from.slot, from.generation, value);
        ndm_i_noted(address ? NDM_OK : -1, &refusal);
        Py_END_ALLOW_THREADS
    } while (!address && refusal.status == NDM_ERR_WAIT && ndm_i_go_on(&wait, &refusal, NDM_ERR_STALE));
    return ndm_i_viewed(view, address, value->size, arguments[0], arguments[1], &refusal);
}

/* read_shared(reader, slot, generation) -> memoryview */
static PyObject *read_shared(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    ndm_value value = {0};
    return view_shared(arguments, count, &value);
}

/* read_shared_bytes(reader, slot, generation) -> bytes */
static PyObject *read_shared_bytes(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    ndm_i_source from;
    return get_shared(arguments, count, &from) ? ndm_i_bytes_of(&from, arguments[0], arguments[1]) : NULL;
}

/* Slots and their generations; None stands for any. */
typedef struct {
    ndm_reader *reader;
    ndm_i_numbers slots, generations;
} shared_numbers;

static void let_go_of_numbers(shared_numbers *from)
{
    PyBuffer_Release(&from->slots.buffer);
    if (from->generations.at)
        PyBuffer_Release(&from->generations.buffer);
}

static bool get_many_shared(PyObject *const *arguments, shared_numbers *from)
{
    *from = (shared_numbers){.reader = ndm_i_held_reader(arguments[0])};
    if (!from->reader || !ndm_i_get_numbers(arguments[1], &from->slots))
        return false;
    if (arguments[2] != Py_None && !ndm_i_get_numbers(arguments[2], &from->generations)) {
        PyBuffer_Release(&from->slots.buffer);
        return false;
    }
    if (!from->generations.at || from->generations.count == from->slots.count)
        return true;
    PyErr_SetString(PyExc_ValueError, "each slot needs its generation");
    let_go_of_numbers(from);
    return false;
}

/* read_many_shared(reader, buffer of slots, buffer of generations or None) -> list of memoryviews */
static PyObject *read_many_shared(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    shared_numbers from;
    ndm_error refusal;
    ndm_i_wait wait = {0};
    PyObject *result = NULL;
    if (!ndm_i_has_count(count, 3) || !get_many_shared(arguments, &from))
        return NULL;
    const char **addresses = calloc((size_t)from.slots.count + 1, sizeof *addresses);
    uint64_t *sizes = calloc((size_t)from.slots.count + 1, sizeof *sizes);
    if (addresses && sizes) {
        int64_t status;
        do {
            Py_BEGIN_ALLOW_THREADS
            status = ndm_reader_read_many(from.reader, from.slots.at, from.generations.at, (uint64_t)from.slots.count,
                                          addresses, sizes);
            ndm_i_noted(status, &refusal);
            Py_END_ALLOW_THREADS
        } while (status == NDM_ERR_WAIT && ndm_i_go_on(&wait, &refusal, NDM_ERR_STALE));
        result = status < 0 ? ndm_i_refuse(arguments[0], NULL, &refusal)
                            : ndm_i_list_of_views(addresses, sizes, from.slots.count);
    } else {
        PyErr_NoMemory();
    }
    free(addresses);
    free(sizes);
    let_go_of_numbers(&from);
    return result;
}

/* read_many_shared_into(reader, buffer of slots, buffer of generations or None, buffer, buffer for the sizes) */
static PyObject *read_many_shared_into(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    Py_buffer target;
    shared_numbers from;
    ndm_i_numbers sizes;
    ndm_error refusal;
    ndm_i_wait wait = {0};
    PyObject *result = NULL;
    if (!ndm_i_has_count(count, 5) || !get_many_shared(arguments, &from))
        return NULL;
    if (!ndm_i_get_room(arguments[4], &sizes, from.slots.count))
        goto end_slots;
    if (!ndm_i_get_buffer(arguments[3], &target, PyBUF_WRITABLE))
        goto end_sizes;
    int64_t total;
    do {
        Py_BEGIN_ALLOW_THREADS
        total = ndm_reader_load_many(from.reader, from.slots.at, from.generations.at, (uint64_t)from.slots.count,
                                     target.buf, (uint64_t)target.len, sizes.at);
        ndm_i_noted(total, &refusal);
        Py_END_ALLOW_THREADS
    } while (total == NDM_ERR_WAIT && ndm_i_go_on(&wait, &refusal, NDM_ERR_STALE));
    result = ndm_i_loaded(total, target.len, arguments[0], &refusal);
    PyBuffer_Release(&target);

end_sizes:
    PyBuffer_Release(&sizes.buffer);
end_slots:
    let_go_of_numbers(&from);
    return result;
}

/* borrow(reader, slot, generation) -> memoryview, loan */
static PyObject *borrow(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    loan *kept = calloc(1, sizeof *kept);
    if (!kept)
        return PyErr_NoMemory();
    PyObject *memory = view_shared(arguments, count, &kept->value);
    PyObject *capsule = memory ? PyCapsule_New(kept, loan_name, loan_free) : NULL;
    if (!capsule) {
        Py_XDECREF(memory);
        free(kept);
        return NULL;
    }
    kept->holder = Py_NewRef(arguments[0]);
    PyObject *result = PyTuple_Pack(2, memory, capsule);
    Py_DECREF(memory);
    Py_DECREF(capsule);
    return result;
}

/* is_unchanged(loan) -> bool */
static PyObject *is_unchanged(PyObject *Py_UNUSED(module), PyObject *object)
{
    if (!PyCapsule_IsValid(object, loan_name)) {
        PyErr_SetString(PyExc_TypeError, "the loan of a borrow is needed");
        return NULL;
    }
    const loan *kept = PyCapsule_GetPointer(object, loan_name);
    ndm_reader *reader = ndm_i_held_reader(kept->holder);
    ndm_error refusal;
    int64_t status;
    Py_BEGIN_ALLOW_THREADS
    status = ndm_i_noted(ndm_reader_is_unchanged(reader, &kept->value), &refusal);
    Py_END_ALLOW_THREADS
    if (status >= 0)
        return PyBool_FromLong((long)status);
    PyObject *slot = PyLong_FromLongLong(kept->value.slot);
    if (slot)
        ndm_i_refuse(kept->holder, slot, &refusal);
    Py_XDECREF(slot);
    return NULL;
}

/* lease(reader, slot, generation) -> memoryview */
static PyObject *lease(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    ndm_i_source from;
    ndm_value value = {0};
    const char *address = NULL;
    int64_t number;
    ndm_error refusal;
    ndm_i_wait wait = {0};
    View *view;
    if (!get_shared(arguments, count, &from) || !(view = ndm_i_view_new(false)))
        return NULL;
    do {
        Py_BEGIN_ALLOW_THREADS
        number = ndm_reader_lease(from.reader, from.slot, from.generation, &address, &value);
        ndm_i_noted(number, &refusal);
        Py_END_ALLOW_THREADS
    } while (number == NDM_ERR_WAIT && ndm_i_go_on(&wait, &refusal, NDM_ERR_STALE));
    if (number >= 0) {
        view->leased_by = (Holder *)Py_NewRef(arguments[0]);
        view->lease = number;
        view->offset = value.offset;
    }
    return ndm_i_viewed(view, address, value.size, arguments[0], arguments[1], &refusal);
}

/* leased_at(view) -> where in the file the leased value is: it stays there */
static PyObject *leased_at(PyObject *Py_UNUSED(module), PyObject *object)
{
    const View *view = ndm_i_as_view(object);
    return view ? PyLong_FromUnsignedLongLong(view->offset) : NULL;
}

/* end_lease(view): ends the lease, if it has not ended. */
static PyObject *end_lease(PyObject *Py_UNUSED(module), PyObject *object)
{
    int64_t status;
    ndm_error refusal;
    View *view = ndm_i_as_view(object);
    Holder *holder = view ? view->leased_by : NULL;
    if (!holder)
        return view ? Py_NewRef(Py_None) : NULL;
    view->leased_by = NULL; /* before another thread may come */
    Py_BEGIN_ALLOW_THREADS
    status = ndm_i_noted(ndm_reader_release(holder->reader, view->lease), &refusal);
    Py_END_ALLOW_THREADS
    if (status < 0) {
        view->leased_by = holder;
        return ndm_i_refuse((PyObject *)holder, NULL, &refusal);
    }
    Py_DECREF(holder);
    Py_RETURN_NONE;
}

/* ---- which values there are ----------------------------------------------------------------------------- */

/* find(reader, slot, generation): raises if there is no such value. */
static PyObject *find(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    ndm_i_source from;
    ndm_value value;
    int64_t status;
    ndm_error refusal;
    ndm_i_wait wait = {0};
    if (!get_shared(arguments, count, &from))
        return NULL;
    do {
        Py_BEGIN_ALLOW_THREADS
        status = ndm_i_noted(ndm_reader_find(from.reader, from.slot, from.generation, &value), &refusal);
        Py_END_ALLOW_THREADS
    } while (status == NDM_ERR_WAIT && ndm_i_go_on(&wait, &refusal, NDM_ERR_STALE));
    if (status < 0)
        return ndm_i_refuse(arguments[0], arguments[1], &refusal);
    Py_RETURN_NONE;
}

/* next_slot(reader, from) -> slot, offset, size, engine, generation of the next live slot; None if there is no other */
static PyObject *next_slot(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    int64_t from, status;
    ndm_value value;
    ndm_error refusal;
    ndm_i_wait wait = {0};
    ndm_reader *reader;
    if (!ndm_i_has_count(count, 2) || !(reader = ndm_i_held_reader(arguments[0])) ||
        !ndm_i_get_number(arguments[1], &from))
        return NULL;
    do {
        Py_BEGIN_ALLOW_THREADS
        status = ndm_i_noted(ndm_reader_next(reader, from, &value), &refusal);
        Py_END_ALLOW_THREADS
        if (status == NDM_ERR_WAIT && value.slot > from) { /* a long table, which ends */
            from = value.slot;
            wait = (ndm_i_wait){0};
        }
    } while (status == NDM_ERR_WAIT && ndm_i_go_on(&wait, &refusal, NDM_ERR_STALE));
    if (status == NDM_ERR_NO_SLOT)
        Py_RETURN_NONE;
    if (status < 0)
        return ndm_i_refuse(arguments[0], NULL, &refusal);
    return Py_BuildValue("LKKik", (long long)value.slot, (unsigned long long)value.offset,
                         (unsigned long long)value.size, (int)value.engine, (unsigned long)value.generation);
}

PyMethodDef ndm_i_sharing[] = {
    NDM_I_VERB("read_shared", read_shared),
    NDM_I_VERB("read_shared_bytes", read_shared_bytes),
    NDM_I_VERB("read_many_shared", read_many_shared),
    NDM_I_VERB("read_many_shared_into", read_many_shared_into),
    NDM_I_VERB("borrow", borrow),
    {"is_unchanged", is_unchanged, METH_O, NULL},
    NDM_I_VERB("lease", lease),
    {"end_lease", end_lease, METH_O, NULL},
    {"leased_at", leased_at, METH_O, NULL},
    NDM_I_VERB("find", find),
    NDM_I_VERB("next_slot", next_slot),
    {NULL, NULL, 0, NULL},
};
