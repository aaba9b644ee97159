/* The two types: how they end, and what their buffers show. */
#include "objects.h"

static PyTypeObject *holder_type, *view_type;

/* ---- Holder --------------------------------------------------------------------------------------------- */

static void holder_free(PyObject *self)
{
    Holder *holder = (Holder *)self;
    PyTypeObject *type = Py_TYPE(self);
    Py_BEGIN_ALLOW_THREADS /* it may wait for the background writer, and unmap much */
    ndm_region_destroy(holder->region);
    ndm_reader_destroy(holder->reader);
    ndm_governor_destroy(holder->governor);
    Py_END_ALLOW_THREADS
    Py_DECREF(holder->where);
    Py_XDECREF(holder->facade);
    Py_XDECREF(holder->names);
    PyObject_Free(self);
    Py_DECREF(type);
}

/* A buffer of one byte: no more than the address. */
static int holder_export(PyObject *self, Py_buffer *buffer, int flags)
{
    Holder *holder = (Holder *)self;
    void *held = holder->region     ? (void *)holder->region
                 : holder->governor ? (void *)holder->governor
                                    : (void *)holder->reader;
    return PyBuffer_FillInfo(buffer, self, held, 1, 1, flags);
}

Holder *ndm_i_holder_new(PyObject *where)
{
    Holder *holder = PyObject_New(Holder, holder_type);
    if (holder) {
        holder->region = NULL;
        holder->reader = NULL;
        holder->governor = NULL;
        holder->where = Py_NewRef(where);
        holder->facade = holder->names = NULL;
        holder->repeated = holder->unreleased = 0;
        holder->attention = holder->traced = 0;
    }
    return holder;
}

static Holder *as_holder(PyObject *object)
{
    return Py_TYPE(object) == holder_type ? (Holder *)object : NULL;
}

ndm_region *ndm_i_held_region(PyObject *object)
{
    const Holder *holder = as_holder(object);
    if (holder && holder->region)
        return holder->region;
    PyErr_SetString(PyExc_TypeError, "the holder of a region is needed");
    return NULL;
}

ndm_reader *ndm_i_held_reader(PyObject *object)
{
    const Holder *holder = as_holder(object);
    if (holder && holder->reader)
        return holder->reader;
    PyErr_SetString(PyExc_TypeError, "the holder of a reader is needed");
    return NULL;
}

Holder *ndm_i_held_governor(PyObject *object)
{
    Holder *holder = as_holder(object);
    if (holder && holder->governor)
        return holder;
    PyErr_SetString(PyExc_TypeError, "the holder of a governor is needed");
    return NULL;
}

PyObject *ndm_i_holder_where(PyObject *holder) { return ((Holder *)holder)->where; }

/* ---- View ----------------------------------------------------------------------------------------------- */

/* In a forked child, which has leased nothing, the core does nothing. */
static void end_lease(View *view)
{
    Holder *holder = view->leased_by;
    if (!holder)
        return;
    Py_BEGIN_ALLOW_THREADS
    ndm_reader_release(holder->reader, view->lease);
    Py_END_ALLOW_THREADS
    Py_DECREF(holder);
}

static void view_free(PyObject *self)
{
    View *view = (View *)self;
    PyTypeObject *type = Py_TYPE(self);
    end_lease(view);
    if (ndm_view_try_release(view->address) == NDM_ERR_WAIT) {
        Py_BEGIN_ALLOW_THREADS
        ndm_view_release(view->address);
        Py_END_ALLOW_THREADS
    }
    PyObject_Free(self);
    Py_DECREF(type);
}

static int view_export(PyObject *self, Py_buffer *buffer, int flags)
{
    View *view = (View *)self;
    return PyBuffer_FillInfo(buffer, self, (char *)view->address, (Py_ssize_t)view->size, !view->writable, flags);
}

View *ndm_i_view_new(bool writable)
{
    View *view = PyObject_New(View, view_type);
    if (view) {
        view->address = NULL;
        view->size = 0;
        view->writable = writable;
        view->leased_by = NULL;
        view->lease = -1;
        view->offset = 0;
    }
    return view;
}

PyObject *ndm_i_view_memory(View *view)
{
    PyObject *memory = PyMemoryView_FromObject((PyObject *)view);
    Py_DECREF(view);
    return memory;
}

View *ndm_i_as_view(PyObject *object)
{
    if (Py_TYPE(object) == view_type)
        return (View *)object;
    PyErr_SetString(PyExc_TypeError, "a view is needed");
    return NULL;
}

/* ---- the types ------------------------------------------------------------------------------------------ */

static PyType_Slot holder_slots[] = {
    {Py_tp_dealloc, (void *)holder_free}, {Py_bf_getbuffer, (void *)holder_export}, {0, NULL}};

static PyType_Spec holder_spec = {
    .name = "nodedb_mem._memory.Holder",
    .basicsize = sizeof(Holder),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = holder_slots,
};

static PyType_Slot view_slots[] = {
    {Py_tp_dealloc, (void *)view_free}, {Py_bf_getbuffer, (void *)view_export}, {0, NULL}};

static PyType_Spec view_spec = {
    .name = "nodedb_mem._memory.View",
    .basicsize = sizeof(View),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = view_slots,
};

int ndm_i_objects_init(void)
{
    holder_type = (PyTypeObject *)PyType_FromSpec(&holder_spec);
    view_type = (PyTypeObject *)PyType_FromSpec(&view_spec);
    return holder_type && view_type ? 0 : -1;
}
