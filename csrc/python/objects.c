/* What cffi cannot give: Python objects that stand for the core's memory, and the verbs that take or return them.
 *
 * A view has to be read-only for everybody who can reach its memory, memoryview.obj included, and has to end when the
 * last object that uses it is gone, not before: the finalizers of a cycle run in any order, and cffi's ffi.gc() is one
 * of them, so that a __del__ in the same cycle would meet a region, or a view, that has ended. The types here have no
 * finalizer: the collector frees them after all finalizers have run.
 *
 *   Holder   owns a region or a reader. cffi's functions get the pointer through its buffer, which keeps it alive.
 *   View     owns one view. Its buffer is the value.
 *
 * The verbs return None, or a negative ndm_status where a number is expected, for a failure that ndm_last_error() tells.
 * They let go of the GIL wherever the core may wait for the disk.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include "nodedb_mem.h"

#include <stdbool.h>
#include <stdlib.h>

typedef struct {
    PyObject_HEAD
    void *held; /* an ndm_region or an ndm_reader */
    bool is_region;
} Holder;

typedef struct {
    PyObject_HEAD
    const char *address;
    Py_ssize_t size;
    bool writable;
    PyObject *weak_references;
} View;

static PyTypeObject *holder_type, *view_type;

/* ---- Holder --------------------------------------------------------------------------------------------- */

static void holder_free(PyObject *self)
{
    Holder *holder = (Holder *)self;
    PyTypeObject *type = Py_TYPE(self);
    Py_BEGIN_ALLOW_THREADS /* it may wait for the background writer, and unmap much */
    if (holder->is_region)
        ndm_region_destroy(holder->held);
    else
        ndm_reader_destroy(holder->held);
    Py_END_ALLOW_THREADS
    PyObject_Free(self);
    Py_DECREF(type);
}

/* A buffer of one byte: no more than the address. */
static int holder_export(PyObject *self, Py_buffer *buffer, int flags)
{
    return PyBuffer_FillInfo(buffer, self, ((Holder *)self)->held, 1, 1, flags);
}

static PyObject *hold(PyObject *address, bool is_region)
{
    void *held = PyLong_AsVoidPtr(address);
    if (!held && PyErr_Occurred())
        return NULL;
    Holder *holder = PyObject_New(Holder, holder_type);
    if (holder) {
        holder->held = held;
        holder->is_region = is_region;
    }
    return (PyObject *)holder;
}

static PyObject *hold_region(PyObject *Py_UNUSED(module), PyObject *address) { return hold(address, true); }

static PyObject *hold_reader(PyObject *Py_UNUSED(module), PyObject *address) { return hold(address, false); }

/* What a holder holds. NULL, with an exception, for anything else. */
static void *held_by(PyObject *object, bool is_region)
{
    if (Py_TYPE(object) == holder_type && ((Holder *)object)->is_region == is_region)
        return ((Holder *)object)->held;
    PyErr_SetString(PyExc_TypeError, "a holder is needed");
    return NULL;
}

/* ---- View ----------------------------------------------------------------------------------------------- */

static void view_free(PyObject *self)
{
    View *view = (View *)self;
    PyTypeObject *type = Py_TYPE(self);
    if (view->weak_references)
        PyObject_ClearWeakRefs(self);
    ndm_view_release(view->address);
    PyObject_Free(self);
    Py_DECREF(type);
}

static int view_export(PyObject *self, Py_buffer *buffer, int flags)
{
    View *view = (View *)self;
    return PyBuffer_FillInfo(buffer, self, (char *)view->address, view->size, !view->writable, flags);
}

/* A memoryview of a view, which is released with it, or now if there is no memory. */
static PyObject *view_new(const char *address, uint64_t size, bool writable)
{
    View *view = PyObject_New(View, view_type);
    if (!view) {
        ndm_view_release(address);
        return NULL;
    }
    view->address = address;
    view->size = (Py_ssize_t)size;
    view->writable = writable;
    view->weak_references = NULL;
    PyObject *memory = PyMemoryView_FromObject((PyObject *)view);
    Py_DECREF(view);
    return memory;
}

/* view(address, size, writable): the core has given this view; from now on the memoryview owns it. */
static PyObject *make_view(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    unsigned long long address, size;
    int writable;
    if (!PyArg_ParseTuple(arguments, "KKp", &address, &size, &writable))
        return NULL;
    return view_new((const char *)(uintptr_t)address, size, writable);
}

/* ---- arguments ------------------------------------------------------------------------------------------ */

static bool has_count(Py_ssize_t given, Py_ssize_t wanted)
{
    if (given == wanted)
        return true;
    PyErr_Format(PyExc_TypeError, "%zd arguments are needed", wanted);
    return false;
}

/* A slot number; one that no int64_t holds becomes one that no slot has. */
static bool get_slot(PyObject *object, int64_t *slot)
{
    int overflow = 0;
    if (PyLong_Check(object)) {
        *slot = PyLong_AsLongLongAndOverflow(object, &overflow);
    } else {
        PyObject *number = PyNumber_Index(object);
        if (!number)
            return false;
        *slot = PyLong_AsLongLongAndOverflow(number, &overflow);
        Py_DECREF(number);
    }
    if (overflow)
        *slot = -1;
    return *slot != -1 || !PyErr_Occurred();
}

/* The memory of a value. What cannot change needs no export: `buffer->obj` is NULL then. */
static bool get_data(PyObject *object, Py_buffer *buffer)
{
    if (!PyBytes_CheckExact(object))
        return PyObject_GetBuffer(object, buffer, PyBUF_SIMPLE) == 0;
    buffer->obj = NULL;
    buffer->buf = PyBytes_AsString(object);
    buffer->len = PyBytes_Size(object);
    return true;
}

static void let_go(Py_buffer *buffer)
{
    if (buffer->obj)
        PyBuffer_Release(buffer);
}

/* ---- one value ------------------------------------------------------------------------------------------ */

/* write(region, data, engine) -> int */
static PyObject *write_value(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    Py_buffer data;
    ndm_region *region;
    if (!has_count(count, 3) || !(region = held_by(arguments[0], true)))
        return NULL;
    const int64_t engine = PyLong_AsLongLong(arguments[2]);
    if ((engine == -1 && PyErr_Occurred()) || !get_data(arguments[1], &data))
        return NULL;
    int64_t slot;
    Py_BEGIN_ALLOW_THREADS
    slot = ndm_region_write(region, data.buf, (uint64_t)data.len, engine);
    Py_END_ALLOW_THREADS
    let_go(&data);
    return PyLong_FromLongLong(slot);
}

/* read(region, slot) -> memoryview or None */
static PyObject *read_value(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    ndm_region *region;
    int64_t slot;
    uint64_t size = 0;
    if (!has_count(count, 2) || !(region = held_by(arguments[0], true)) || !get_slot(arguments[1], &slot))
        return NULL;
    const char *view = ndm_region_try_read(region, slot, &size);
    if (!view && ndm_last_error()->status == NDM_ERR_WAIT) {
        Py_BEGIN_ALLOW_THREADS
        view = ndm_region_read(region, slot, &size);
        Py_END_ALLOW_THREADS
    }
    if (!view)
        Py_RETURN_NONE;
    return view_new(view, size, false);
}

/* A value that is to be copied: a region's, or a reader's. */
typedef struct {
    ndm_region *region;
    ndm_reader *reader;
    int64_t slot, generation;
} source;

static int64_t copy(const source *from, void *buffer, int64_t room)
{
    int64_t size;
    Py_BEGIN_ALLOW_THREADS
    size = from->region ? ndm_region_read_into(from->region, from->slot, buffer, (uint64_t)room)
                        : ndm_reader_copy(from->reader, from->slot, from->generation, buffer, (uint64_t)room);
    Py_END_ALLOW_THREADS
    return size;
}

static PyObject *bytes_of(const source *from)
{
    char small[512];
    int64_t size = copy(from, small, sizeof small), room = sizeof small;
    PyObject *bytes = NULL;
    while (size > room) { /* again where a larger value has come meanwhile */
        Py_XDECREF(bytes);
        if (!(bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size)))
            return NULL;
        room = size;
        size = copy(from, PyBytes_AsString(bytes), room);
    }
    if (bytes && size == room)
        return bytes;
    const char *copied = bytes ? PyBytes_AsString(bytes) : small;
    PyObject *result = size < 0 ? Py_NewRef(Py_None) : PyBytes_FromStringAndSize(copied, (Py_ssize_t)size);
    Py_XDECREF(bytes);
    return result;
}

/* read_bytes(region, slot) -> bytes or None */
static PyObject *read_bytes(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    source from = {.generation = -1};
    if (!has_count(count, 2) || !(from.region = held_by(arguments[0], true)) || !get_slot(arguments[1], &from.slot))
        return NULL;
    return bytes_of(&from);
}

/* read_shared_bytes(reader, slot, generation) -> bytes or None */
static PyObject *read_shared_bytes(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    source from = {0};
    if (!has_count(count, 3) || !(from.reader = held_by(arguments[0], false)) || !get_slot(arguments[1], &from.slot) ||
        !get_slot(arguments[2], &from.generation))
        return NULL;
    return bytes_of(&from);
}

/* free(region, slot) -> status */
static PyObject *free_value(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    ndm_region *region;
    int64_t slot;
    int status;
    if (!has_count(count, 2) || !(region = held_by(arguments[0], true)) || !get_slot(arguments[1], &slot))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = ndm_region_free(region, slot);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(status);
}

/* read_shared(reader, slot, generation) -> memoryview or None */
static PyObject *read_shared(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    ndm_reader *reader;
    int64_t slot, generation;
    ndm_value value;
    const char *view;
    if (!has_count(count, 3) || !(reader = held_by(arguments[0], false)) || !get_slot(arguments[1], &slot) ||
        !get_slot(arguments[2], &generation))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    view = ndm_reader_read(reader, slot, generation, &value);
    Py_END_ALLOW_THREADS
    if (!view)
        Py_RETURN_NONE;
    return view_new(view, value.size, false);
}

/* ---- many ----------------------------------------------------------------------------------------------- */

/* The list of the slots' numbers. */
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

/* write_many(region, list of buffers, engine) -> list or status */
static PyObject *write_many(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    ndm_region *region;
    if (!has_count(count, 3) || !(region = held_by(arguments[0], true)))
        return NULL;
    const int64_t engine = PyLong_AsLongLong(arguments[2]);
    const Py_ssize_t total = PyList_Size(arguments[1]);
    if ((engine == -1 && PyErr_Occurred()) || total < 0)
        return NULL;

    PyObject *result = NULL;
    Py_ssize_t got = 0;
    Py_buffer *data = calloc((size_t)total, sizeof *data);
    const void **parts = calloc((size_t)total, sizeof *parts);
    uint64_t *sizes = calloc((size_t)total, sizeof *sizes);
    int64_t *slots = calloc((size_t)total, sizeof *slots);
    if (total > 0 && !(data && parts && sizes && slots)) {
        PyErr_NoMemory();
        goto end;
    }
    for (; got < total; got++) {
        PyObject *value = PyList_GetItem(arguments[1], got);
        if (!value || !get_data(value, &data[got]))
            goto end;
        parts[got] = data[got].buf;
        sizes[got] = (uint64_t)data[got].len;
    }
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = ndm_region_write_many(region, parts, sizes, (uint64_t)total, engine, slots);
    Py_END_ALLOW_THREADS
    result = status < 0 ? PyLong_FromLong(status) : list_of_numbers(slots, total);

end:
    while (got > 0)
        let_go(&data[--got]);
    free(data);
    free(parts);
    free(sizes);
    free(slots);
    return result;
}

static PyObject *list_of_views(const char **views, const uint64_t *sizes, Py_ssize_t count)
{
    PyObject *list = PyList_New(count);
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *memory = list ? view_new(views[i], sizes[i], false) : NULL;
        if (!list)
            ndm_view_release(views[i]);
        else if (!memory)
            Py_CLEAR(list);
        else
            PyList_SetItem(list, i, memory);
    }
    return list;
}

/* read_many(region, buffer of int64) -> list of memoryviews, or None */
static PyObject *read_many(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    ndm_region *region;
    Py_buffer slots;
    if (!has_count(count, 2) || !(region = held_by(arguments[0], true)) ||
        PyObject_GetBuffer(arguments[1], &slots, PyBUF_SIMPLE) != 0)
        return NULL;
    const Py_ssize_t total = slots.len / (Py_ssize_t)sizeof(int64_t);
    PyObject *result = NULL;
    const char **views = calloc((size_t)total, sizeof *views);
    uint64_t *sizes = calloc((size_t)total, sizeof *sizes);
    if (total > 0 && !(views && sizes)) {
        PyErr_NoMemory();
    } else {
        int status;
        Py_BEGIN_ALLOW_THREADS
        status = ndm_region_read_many(region, slots.buf, (uint64_t)total, views, sizes);
        Py_END_ALLOW_THREADS
        result = status < 0 ? Py_NewRef(Py_None) : list_of_views(views, sizes, total);
    }
    free(views);
    free(sizes);
    PyBuffer_Release(&slots);
    return result;
}

/* ---- the module ----------------------------------------------------------------------------------------- */

static PyType_Slot holder_slots[] = {
    {Py_tp_dealloc, (void *)holder_free}, {Py_bf_getbuffer, (void *)holder_export}, {0, NULL}};

static PyType_Spec holder_spec = {
    .name = "nodedb_mem._objects.Holder",
    .basicsize = sizeof(Holder),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = holder_slots,
};

static PyMemberDef view_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(View, weak_references), READONLY, NULL}, {NULL, 0, 0, 0, NULL}};

static PyType_Slot view_slots[] = {{Py_tp_dealloc, (void *)view_free},
                                   {Py_bf_getbuffer, (void *)view_export},
                                   {Py_tp_members, view_members},
                                   {0, NULL}};

static PyType_Spec view_spec = {
    .name = "nodedb_mem._objects.View",
    .basicsize = sizeof(View),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = view_slots,
};

#define FAST(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef functions[] = {
    {"hold_region", hold_region, METH_O, NULL},
    {"hold_reader", hold_reader, METH_O, NULL},
    {"view", make_view, METH_VARARGS, NULL},
    {"write", FAST(write_value), METH_FASTCALL, NULL},
    {"read", FAST(read_value), METH_FASTCALL, NULL},
    {"read_bytes", FAST(read_bytes), METH_FASTCALL, NULL},
    {"free", FAST(free_value), METH_FASTCALL, NULL},
    {"read_shared", FAST(read_shared), METH_FASTCALL, NULL},
    {"read_shared_bytes", FAST(read_shared_bytes), METH_FASTCALL, NULL},
    {"write_many", FAST(write_many), METH_FASTCALL, NULL},
    {"read_many", FAST(read_many), METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "nodedb_mem._objects", .m_size = -1, .m_methods = functions};

PyMODINIT_FUNC PyInit__objects(void)
{
    holder_type = (PyTypeObject *)PyType_FromSpec(&holder_spec);
    view_type = (PyTypeObject *)PyType_FromSpec(&view_spec);
    return holder_type && view_type ? PyModule_Create(&module) : NULL;
}
