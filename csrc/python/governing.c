/* See governing.h: the base type of governors, and the functions that fill reservations. */
#include "governing.h"

#include "arguments.h"
#include "refusals.h"

#include <string.h>

typedef struct {
    PyObject_HEAD
    Holder *holder; /* NULL before _hold() */
} Governor;

static PyObject *no_wait, *waiting; /* 0, and "timeout" */

/* ---- reserve -------------------------------------------------------------------------------------------- */

static Holder *holder_of(PyObject *self)
{
    Holder *holder = ((Governor *)self)->holder;
    if (!holder)
        PyErr_SetString(PyExc_RuntimeError, "the governor is not initialised");
    return holder;
}

static bool get_request(PyObject *const *arguments, Py_ssize_t count, int64_t *engine, int64_t *size)
{
    if (!ndm_i_has_count(count, 2) || !ndm_i_get_number(arguments[0], engine))
        return false;
    if (*engine < 0 || *engine > 255) {
        PyErr_SetString(PyExc_ValueError, "engine must be 0 to 255");
        return false;
    }
    return ndm_i_get_size(arguments[1], size);
}

/* The reservation, when the facade has heard of it. Takes the reference. NULL where that is interrupted; the bytes are given
 * back then. */
static PyObject *attended(Reservation *reservation)
{
    if (ndm_i_attend(reservation->holder, reservation->engine))
        return (PyObject *)reservation;
    ndm_i_let_go_of(reservation);
    Py_DECREF(reservation);
    return NULL;
}

/* Reserve; what is refused for want of room is the Python class's to do. */
static PyObject *obtain(PyObject *self, int64_t engine, int64_t size, PyObject *timeout, bool quiet)
{
    Holder *holder = holder_of(self);
    Reservation *reservation = holder ? ndm_i_reservation_new(holder, engine) : NULL;
    ndm_error refusal;
    if (!reservation)
        return NULL;
    const int64_t status = ndm_i_fill(reservation, size, &refusal);
    if (status == NDM_OK)
        return attended(reservation);
    PyObject *result = NULL, *details = NULL;
    if (status != NDM_ERR_BUDGET && status != NDM_ERR_CEILING && status != NDM_ERR_ENGINE)
        ndm_i_refuse((PyObject *)holder, NULL, &refusal);
    else if ((details = ndm_i_details(&refusal)))
        result = PyObject_CallMethod(self, "_obtain", "OLOOO", (PyObject *)reservation, (long long)size, timeout, details,
                                     quiet ? Py_True : Py_False);
    if (!result)
        ndm_i_let_go_of(reservation);
    Py_XDECREF(details);
    Py_DECREF(reservation);
    if (!result || result == Py_None)
        return result;
    Reservation *filled_one = ndm_i_as_reservation(result);
    if (!filled_one)
        Py_DECREF(result);
    return filled_one ? attended(filled_one) : NULL;
}

/* A number of seconds, or None. */
static bool is_timeout(PyObject *timeout)
{
    const double seconds = timeout == Py_None ? 0 : PyFloat_AsDouble(timeout);
    if (seconds == -1 && PyErr_Occurred())
        return false;
    if (seconds == seconds)
        return true;
    PyErr_SetString(PyExc_ValueError, "timeout must be a number of seconds, or None");
    return false;
}

/* reserve(engine, size, *, timeout=0) */
static PyObject *reserve(PyObject *self, PyObject *const *arguments, Py_ssize_t count, PyObject *names)
{
    int64_t engine, size;
    PyObject *timeout = no_wait;
    const Py_ssize_t named = names ? PyTuple_Size(names) : 0;
    if (named == 1 && PyUnicode_Compare(PyTuple_GetItem(names, 0), waiting) == 0) {
        timeout = arguments[count];
    } else if (named > 0) {
        PyErr_SetString(PyExc_TypeError, "reserve() takes engine and size, and timeout by its name");
        return NULL;
    }
    if (!get_request(arguments, count, &engine, &size) || !is_timeout(timeout))
        return NULL;
    return obtain(self, engine, size, timeout, false);
}

static PyObject *try_reserve(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    int64_t engine, size;
    return get_request(arguments, count, &engine, &size) ? obtain(self, engine, size, no_wait, true) : NULL;
}

static PyObject *charge(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    int64_t engine, size, status;
    ndm_error refusal;
    Holder *holder = holder_of(self);
    if (!holder || !get_request(arguments, count, &engine, &size))
        return NULL;
    Reservation *reservation = ndm_i_reservation_new(holder, engine);
    if (!reservation)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = ndm_i_noted(ndm_governor_charge(holder->governor, engine, (uint64_t)size), &refusal);
    Py_END_ALLOW_THREADS
    if (status < 0) {
        Py_DECREF(reservation);
        PyObject *details = status == NDM_ERR_ENGINE ? ndm_i_details(&refusal) : NULL;
        PyObject *error = details ? PyObject_CallMethod(self, "_error", "O", details) : NULL;
        if (error)
            PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        else if (!PyErr_Occurred())
            ndm_i_refuse((PyObject *)holder, NULL, &refusal);
        Py_XDECREF(error);
        Py_XDECREF(details);
        return NULL;
    }
    reservation->size = size;
    reservation->epoch = ndm_governor_epoch(holder->governor);
    reservation->held = true;
    return attended(reservation);
}

/* ---- what the Python class does with reservations ------------------------------------------------------- */

/* None if it is filled, the details of the refusal if there was no room; anything else is raised. */
static PyObject *filled(Reservation *reservation, int64_t status, const ndm_error *refusal)
{
    if (status == NDM_OK)
        Py_RETURN_NONE;
    if (status == NDM_ERR_BUDGET || status == NDM_ERR_CEILING)
        return ndm_i_details(refusal);
    return ndm_i_refuse((PyObject *)reservation->holder, NULL, refusal);
}

/* fill(reservation, size) -> None or details */
static PyObject *fill(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    int64_t size;
    ndm_error refusal;
    Reservation *reservation;
    if (!ndm_i_has_count(count, 2) || !(reservation = ndm_i_as_reservation(arguments[0])) ||
        !ndm_i_get_size(arguments[1], &size))
        return NULL;
    const int64_t status = ndm_i_fill(reservation, size, &refusal);
    return filled(reservation, status, &refusal);
}

/* queue(reservation, size): stand in the line. False: it could never fit. */
static PyObject *queue(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    int64_t size, ticket;
    ndm_error refusal;
    Reservation *reservation;
    if (!ndm_i_has_count(count, 2) || !(reservation = ndm_i_as_reservation(arguments[0])) ||
        !ndm_i_get_size(arguments[1], &size))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    ticket = ndm_i_noted(ndm_governor_queue(reservation->holder->governor, reservation->engine, (uint64_t)size), &refusal);
    Py_END_ALLOW_THREADS
    if (ticket == NDM_ERR_BUDGET || ticket == NDM_ERR_CEILING)
        Py_RETURN_FALSE;
    if (ticket < 0)
        return ndm_i_refuse((PyObject *)reservation->holder, NULL, &refusal);
    reservation->ticket = ticket;
    reservation->wanted = size;
    Py_RETURN_TRUE;
}

/* wait(reservation, nanoseconds): in the line. None, details, or False where the time is over, or a signal came. */
static PyObject *wait_for(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    int64_t timeout, status;
    ndm_error refusal;
    Reservation *reservation;
    if (!ndm_i_has_count(count, 2) || !(reservation = ndm_i_as_reservation(arguments[0])) ||
        !ndm_i_get_size(arguments[1], &timeout))
        return NULL;
    const int64_t ticket = reservation->ticket;
    Py_BEGIN_ALLOW_THREADS
    status = ndm_i_noted(ndm_governor_wait(reservation->holder->governor, ticket, (uint64_t)timeout), &refusal);
    Py_END_ALLOW_THREADS
    if (status == NDM_ERR_WAIT)
        Py_RETURN_FALSE;
    if (status == NDM_OK) {
        reservation->ticket = 0;
        reservation->size += reservation->wanted;
        reservation->epoch = ndm_governor_epoch(reservation->holder->governor);
        reservation->held = true;
    }
    return filled(reservation, status, &refusal);
}

/* give_up(reservation): leave the line, and give back what was had. Nobody is told. */
static PyObject *give_up(PyObject *Py_UNUSED(module), PyObject *object)
{
    Reservation *reservation = ndm_i_as_reservation(object);
    if (!reservation)
        return NULL;
    ndm_i_let_go_of(reservation);
    Py_RETURN_NONE;
}

/* report(error, about): as an exception that nobody can catch */
static PyObject *report(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    if (!ndm_i_has_count(count, 2))
        return NULL;
    PyErr_SetObject((PyObject *)Py_TYPE(arguments[0]), arguments[0]);
    PyErr_WriteUnraisable(arguments[1]);
    Py_RETURN_NONE;
}

/* ---- opening -------------------------------------------------------------------------------------------- */

/* open_governor(path or None, options or None, where, names) -> Holder */
static PyObject *open_governor(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    const char *path, *given;
    Py_ssize_t path_length, length;
    PyObject *where, *names;
    ndm_governor_options options;
    ndm_error refusal;
    if (!PyArg_ParseTuple(arguments, "z#z#O!O!", &path, &path_length, &given, &length, &PyTuple_Type, &where, &PyDict_Type,
                          &names))
        return NULL;
    if (path && strlen(path) != (size_t)path_length) {
        PyErr_SetString(PyExc_ValueError, "embedded null byte in the path");
        return NULL;
    }
    if (given && length != (Py_ssize_t)sizeof options) {
        PyErr_SetString(PyExc_TypeError, "an ndm_governor_options is needed");
        return NULL;
    }
    Holder *holder = ndm_i_holder_new(where);
    if (!holder)
        return NULL;
    holder->names = Py_NewRef(names);
    if (given)
        memcpy(&options, given, sizeof options);
    const ndm_governor_options *wanted = given ? &options : NULL;
    Py_BEGIN_ALLOW_THREADS
    holder->governor = path ? ndm_governor_open(path, wanted) : ndm_governor_create(wanted);
    ndm_i_noted(holder->governor ? NDM_OK : -1, &refusal);
    Py_END_ALLOW_THREADS
    if (holder->governor)
        return (PyObject *)holder;
    ndm_i_refuse((PyObject *)holder, NULL, &refusal);
    Py_DECREF(holder);
    return NULL;
}

/* watch(holder, attention, traced): whether the facade hears of reservations and releases; whether they note where */
static PyObject *watch(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    Holder *holder;
    if (!ndm_i_has_count(count, 3) || !(holder = ndm_i_held_governor(arguments[0])))
        return NULL;
    const int attention = PyObject_IsTrue(arguments[1]), traced = PyObject_IsTrue(arguments[2]);
    if (attention < 0 || traced < 0)
        return NULL;
    holder->attention = attention;
    holder->traced = traced;
    Py_RETURN_NONE;
}

/* counts(holder) -> releases of what had been released, reservations that were collected unreleased */
static PyObject *counts(PyObject *Py_UNUSED(module), PyObject *object)
{
    const Holder *holder = ndm_i_held_governor(object);
    return holder ? Py_BuildValue("KK", holder->repeated, holder->unreleased) : NULL;
}

/* _hold(holder): become its facade */
static PyObject *hold(PyObject *self, PyObject *object)
{
    Governor *governor = (Governor *)self;
    Holder *holder = ndm_i_held_governor(object);
    if (!holder)
        return NULL;
    if (governor->holder || holder->facade) {
        PyErr_SetString(PyExc_RuntimeError, "a governor is initialised once: make another");
        return NULL;
    }
    if (!(holder->facade = PyWeakref_NewRef(self, NULL)))
        return NULL;
    governor->holder = (Holder *)Py_NewRef((PyObject *)holder);
    Py_RETURN_NONE;
}

/* ---- the type ------------------------------------------------------------------------------------------- */

static PyObject *governor_new(PyTypeObject *type, PyObject *Py_UNUSED(arguments), PyObject *Py_UNUSED(named))
{
    const allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Governor *governor = (Governor *)allocate(type, 0);
    if (governor)
        governor->holder = NULL;
    return (PyObject *)governor;
}

static void governor_free(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF((PyObject *)((Governor *)self)->holder);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static const char reserve_text[] =
    "reserve(engine, size, /, *, timeout=0) -> Reservation\n\n"
    "Reserve bytes for an engine. What does not fit asks reclaimers first, then waits in line for `timeout` seconds; None\n"
    "waits for as long as it takes.\n\n"
    "Raises\n------\n"
    "BudgetExhaustedError\n    The engine's limit has no room.\n"
    "GlobalCeilingExceededError\n    The ceiling has no room, or what the headroom leaves of it.\n"
    "UnknownEngineError\n    The engine was not added.\n"
    "ValueError\n    The engine is not 0 to 255, or the size is negative, or 2**63 and more.";

static const char try_reserve_text[] =
    "try_reserve(engine, size, /) -> Reservation or None\n\nThe same, but None where there is no room. It does not wait.";

static const char charge_text[] =
    "charge(engine, size, /) -> Reservation\n\n"
    "Count bytes that are taken already. That is never refused; what goes beyond a limit is over-commitment.";

static PyMethodDef methods[] = {
    {"reserve", (PyCFunction)(void (*)(void))reserve, METH_FASTCALL | METH_KEYWORDS, reserve_text},
    {"try_reserve", (PyCFunction)(void (*)(void))try_reserve, METH_FASTCALL, try_reserve_text},
    {"charge", (PyCFunction)(void (*)(void))charge, METH_FASTCALL, charge_text},
    {"_hold", hold, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, (void *)governor_new}, {Py_tp_dealloc, (void *)governor_free}, {Py_tp_methods, methods}, {0, NULL}};

static PyType_Spec spec = {
    .name = "nodedb_mem._memory.Governor",
    .basicsize = sizeof(Governor),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = slots,
};

PyMethodDef ndm_i_governing[] = {
    {"open_governor", open_governor, METH_VARARGS, NULL},
    NDM_I_VERB("fill", fill),
    NDM_I_VERB("queue", queue),
    NDM_I_VERB("wait", wait_for),
    {"give_up", give_up, METH_O, NULL},
    NDM_I_VERB("report", report),
    NDM_I_VERB("watch", watch),
    {"counts", counts, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

int ndm_i_governing_init(PyObject *module)
{
    no_wait = PyLong_FromLong(0);
    waiting = PyUnicode_InternFromString("timeout");
    PyObject *type = PyType_FromSpec(&spec);
    if (!no_wait || !waiting || !type || PyModule_AddObjectRef(module, "Governor", type) < 0)
        return -1;
    Py_DECREF(type);
    return ndm_i_reservation_init(module);
}
