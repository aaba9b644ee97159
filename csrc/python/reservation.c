/* See governing.h: the type of reservations. */
#include "governing.h"

#include "arguments.h"
#include "refusals.h"

static PyTypeObject *reservation_type;

bool ndm_i_get_size(PyObject *object, int64_t *size)
{
    int overflow = 0;
    PyObject *number = PyNumber_Index(object);
    if (!number)
        return false;
    *size = PyLong_AsLongLongAndOverflow(number, &overflow);
    Py_DECREF(number);
    if (!overflow && *size >= 0)
        return true;
    PyErr_SetString(PyExc_ValueError, "a size must not be negative, and below 2**63");
    return false;
}

PyObject *ndm_i_details(const ndm_error *refusal)
{
    return PyBytes_FromStringAndSize((const char *)refusal, sizeof *refusal);
}

/* ---- the facade ----------------------------------------------------------------------------------------- */

/* The Python object, or NULL without an exception. A new reference. */
static PyObject *facade_of(Holder *holder)
{
    PyObject *facade = holder->facade ? PyObject_CallNoArgs(holder->facade) : NULL;
    if (!facade)
        PyErr_Clear();
    if (facade == Py_None)
        Py_CLEAR(facade);
    return facade;
}

static bool tell(Holder *holder, int engine)
{
    PyObject *facade = facade_of(holder);
    PyObject *result = facade ? PyObject_CallMethod(facade, "_attend", "i", engine) : NULL;
    const bool raised = facade && !result;
    const bool reported = raised && PyErr_ExceptionMatches(PyExc_Exception);
    if (reported)
        PyErr_WriteUnraisable(facade);
    Py_XDECREF(result);
    Py_XDECREF(facade);
    return !raised || reported;
}

bool ndm_i_attend(Holder *holder, int engine)
{
    return !(holder->attention || ndm_governor_is_asked(holder->governor)) || tell(holder, engine);
}

/* ---- to and from the core ------------------------------------------------------------------------------- */

/* "file:line" of the Python code that runs; NULL without an exception. */
static PyObject *here(void)
{
    PyFrameObject *frame = PyEval_GetFrame();
    PyObject *code = frame ? (PyObject *)PyFrame_GetCode(frame) : NULL;
    PyObject *file = code ? PyObject_GetAttrString(code, "co_filename") : NULL;
    PyObject *text = file ? PyUnicode_FromFormat("%U:%d", file, PyFrame_GetLineNumber(frame)) : NULL;
    Py_XDECREF(file);
    Py_XDECREF(code);
    PyErr_Clear();
    return text;
}

Reservation *ndm_i_reservation_new(Holder *holder, int64_t engine)
{
    Reservation *reservation = PyObject_New(Reservation, reservation_type);
    if (reservation) {
        reservation->holder = (Holder *)Py_NewRef((PyObject *)holder);
        reservation->size = reservation->epoch = reservation->ticket = reservation->wanted = 0;
        reservation->engine = (int)engine;
        reservation->held = false;
        reservation->made = holder->traced ? here() : NULL;
    }
    return reservation;
}

Reservation *ndm_i_as_reservation(PyObject *object)
{
    if (Py_TYPE(object) == reservation_type)
        return (Reservation *)object;
    PyErr_SetString(PyExc_TypeError, "a Reservation is needed");
    return NULL;
}

int64_t ndm_i_fill(Reservation *reservation, int64_t size, ndm_error *refusal)
{
    ndm_governor *governor = reservation->holder->governor;
    int64_t status = ndm_governor_try_reserve(governor, reservation->engine, (uint64_t)size);
    if (status == NDM_ERR_WAIT) {
        Py_BEGIN_ALLOW_THREADS
        status = ndm_i_noted(ndm_governor_attempt(governor, reservation->engine, (uint64_t)size), refusal);
        Py_END_ALLOW_THREADS
    } else {
        ndm_i_noted(status, refusal);
    }
    if (status == NDM_OK) {
        reservation->size += size;
        reservation->epoch = ndm_governor_epoch(governor);
        reservation->held = true;
    }
    return status;
}

/* It cannot fail: the bytes are reserved, and nobody else has them. */
static void give_back(const Reservation *reservation, int64_t size)
{
    ndm_governor *governor = reservation->holder->governor;
    if (size == 0 || ndm_governor_epoch(governor) != reservation->epoch)
        return;
    if (ndm_governor_try_release(governor, reservation->engine, (uint64_t)size) == NDM_ERR_WAIT) {
        Py_BEGIN_ALLOW_THREADS
        ndm_governor_release(governor, reservation->engine, (uint64_t)size);
        Py_END_ALLOW_THREADS
    }
}

static void leave_line(Reservation *reservation)
{
    const int64_t ticket = reservation->ticket;
    reservation->ticket = 0;
    if (ticket == 0)
        return;
    Py_BEGIN_ALLOW_THREADS
    ndm_governor_leave(reservation->holder->governor, ticket);
    Py_END_ALLOW_THREADS
}

void ndm_i_let_go_of(Reservation *reservation)
{
    const int64_t size = reservation->size;
    reservation->held = false;
    reservation->size = 0;
    leave_line(reservation);
    give_back(reservation, size);
}

/* ---- methods -------------------------------------------------------------------------------------------- */

static bool is_held(const Reservation *reservation)
{
    if (reservation->held)
        return true;
    PyErr_SetString(PyExc_ValueError, "the reservation has been released");
    return false;
}

static PyObject *release(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    Reservation *reservation = (Reservation *)self;
    if (!reservation->held) {
        reservation->holder->repeated++;
        Py_RETURN_NONE;
    }
    ndm_i_let_go_of(reservation);
    return ndm_i_attend(reservation->holder, reservation->engine) ? Py_NewRef(Py_None) : NULL;
}

static PyObject *leave(PyObject *self, PyObject *const *Py_UNUSED(arguments), Py_ssize_t Py_UNUSED(count))
{
    return ((Reservation *)self)->held ? release(self, NULL) : Py_NewRef(Py_None);
}

static PyObject *enter(PyObject *self, PyObject *Py_UNUSED(nothing)) { return Py_NewRef(self); }

/* Reserve the difference, as a reservation of its own that is taken in when it is there. */
static PyObject *grow(Reservation *reservation, int64_t size, PyObject *timeout)
{
    PyObject *facade = facade_of(reservation->holder);
    if (!facade) {
        PyErr_SetString(PyExc_RuntimeError, "the governor is gone");
        return NULL;
    }
    PyObject *more = PyObject_CallMethod(facade, "_more", "iLO", reservation->engine, (long long)size, timeout);
    Py_DECREF(facade);
    Reservation *added = more ? ndm_i_as_reservation(more) : NULL;
    if (added && reservation->held && added->epoch == reservation->epoch) {
        reservation->size += added->size;
        added->held = false;
    } else if (added) {
        ndm_i_let_go_of(added);
        PyErr_SetString(PyExc_ValueError, "the reservation has been released");
        added = NULL;
    }
    Py_XDECREF(more);
    return added ? Py_NewRef(Py_None) : NULL;
}

/* resize(size, *, timeout=0) */
static PyObject *resize(PyObject *self, PyObject *arguments, PyObject *named)
{
    static char *names[] = {"size", "timeout", NULL};
    Reservation *reservation = (Reservation *)self;
    PyObject *object, *timeout = NULL;
    int64_t size;
    if (!PyArg_ParseTupleAndKeywords(arguments, named, "O|$O:resize", names, &object, &timeout) ||
        !ndm_i_get_size(object, &size) || !is_held(reservation))
        return NULL;
    if (size > reservation->size) {
        PyObject *none = timeout ? Py_NewRef(timeout) : PyLong_FromLong(0);
        PyObject *result = none ? grow(reservation, size - reservation->size, none) : NULL;
        Py_XDECREF(none);
        return result;
    }
    const int64_t less = reservation->size - size;
    reservation->size = size;
    give_back(reservation, less);
    return ndm_i_attend(reservation->holder, reservation->engine) ? Py_NewRef(Py_None) : NULL;
}

static PyObject *split(PyObject *self, PyObject *object)
{
    Reservation *reservation = (Reservation *)self;
    int64_t size;
    if (!ndm_i_get_size(object, &size) || !is_held(reservation))
        return NULL;
    if (size > reservation->size)
        return PyErr_Format(PyExc_ValueError, "%lld bytes cannot be split off %lld", (long long)size,
                            (long long)reservation->size);
    Reservation *part = ndm_i_reservation_new(reservation->holder, reservation->engine);
    if (part) {
        reservation->size -= size;
        part->size = size;
        part->epoch = reservation->epoch;
        part->held = true;
    }
    return (PyObject *)part;
}

static PyObject *get_size(PyObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(((Reservation *)self)->size);
}

static PyObject *get_engine(PyObject *self, void *Py_UNUSED(closure))
{
    const Reservation *reservation = (Reservation *)self;
    PyObject *number = PyLong_FromLong(reservation->engine), *names = reservation->holder->names;
    PyObject *engine = number && names ? PyDict_GetItemWithError(names, number) : NULL;
    if (!engine)
        return number;
    Py_DECREF(number);
    return Py_NewRef(engine);
}

static PyObject *get_released(PyObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(!((Reservation *)self)->held);
}

static PyObject *show(PyObject *self)
{
    const Reservation *reservation = (Reservation *)self;
    PyObject *engine = get_engine(self, NULL);
    PyObject *text = NULL;
    if (engine)
        text = reservation->held ? PyUnicode_FromFormat("<Reservation of %lld bytes, engine %S>",
                                                        (long long)reservation->size, engine)
                                 : PyUnicode_FromFormat("<Reservation, released, engine %S>", engine);
    Py_XDECREF(engine);
    return text;
}

/* ---- the end -------------------------------------------------------------------------------------------- */

/* The warning keeps its source for a while, and may keep it for good: the object is alive meanwhile. False: it lives on. */
static bool warned_of(PyObject *self, int64_t size)
{
    Reservation *reservation = (Reservation *)self;
    PyObject *type, *value, *trace;
    Py_SET_REFCNT(self, 1);
    PyErr_Fetch(&type, &value, &trace);
    PyObject *engine = get_engine(self, NULL);
    int failed = !engine;
    if (engine && reservation->made)
        failed = PyErr_ResourceWarning(self, 1, "unreleased reservation of %lld bytes, engine %S (made at %U)",
                                       (long long)size, engine, reservation->made);
    else if (engine)
        failed = PyErr_ResourceWarning(self, 1, "unreleased reservation of %lld bytes, engine %S", (long long)size,
                                       engine);
    if (failed)
        PyErr_WriteUnraisable((PyObject *)Py_TYPE(self));
    Py_XDECREF(engine);
    PyErr_Restore(type, value, trace);
    const Py_ssize_t users = Py_REFCNT(self) - 1;
    Py_SET_REFCNT(self, users);
    return users == 0;
}

static void reservation_free(PyObject *self)
{
    Reservation *reservation = (Reservation *)self;
    PyTypeObject *type = Py_TYPE(self);
    if (reservation->held) {
        const int64_t size = reservation->size;
        const bool ours = ndm_governor_epoch(reservation->holder->governor) == reservation->epoch;
        ndm_i_let_go_of(reservation);
        reservation->holder->unreleased += ours;
        if (ours && !warned_of(self, size))
            return;
    }
    leave_line(reservation);
    Py_XDECREF(reservation->made);
    Py_DECREF(reservation->holder);
    PyObject_Free(self);
    Py_DECREF(type);
}

/* ---- the type ------------------------------------------------------------------------------------------- */

static PyMethodDef methods[] = {
    {"release", release, METH_NOARGS, "Give the bytes back. Doing so again is harmless, and counted."},
    {"resize", (PyCFunction)(void (*)(void))resize, METH_VARARGS | METH_KEYWORDS,
     "resize(size, *, timeout=0): hold that many bytes. Growing is a reservation of the difference, and fails as one."},
    {"split", split, METH_O, "split(size): a new reservation of that many of these bytes."},
    {"__enter__", enter, METH_NOARGS, "Give the reservation itself."},
    {"__exit__", (PyCFunction)(void (*)(void))leave, METH_FASTCALL, "Release it, if that was not done."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"size", get_size, NULL, "Bytes that are reserved; 0 after the release.", NULL},
    {"engine", get_engine, NULL, "The engine they are reserved for.", NULL},
    {"released", get_released, NULL, "Whether they have been given back.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {{Py_tp_dealloc, (void *)reservation_free},
                              {Py_tp_methods, methods},
                              {Py_tp_getset, properties},
                              {Py_tp_repr, (void *)show},
                              {Py_tp_doc, (void *)"Bytes that are reserved until `release`, or the end of a with block."},
                              {0, NULL}};

static PyType_Spec spec = {
    .name = "nodedb_mem._memory.Reservation",
    .basicsize = sizeof(Reservation),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

int ndm_i_reservation_init(PyObject *module)
{
    reservation_type = (PyTypeObject *)PyType_FromSpec(&spec);
    return reservation_type ? PyModule_AddObjectRef(module, "Reservation", (PyObject *)reservation_type) : -1;
}
