/* nodedb_mem._memory: the verbs that take or give Python's memory. What the core refuses is raised as CoreError, for
 * the facade to translate. The core is called without the GIL, but for a read that need not wait. */
#include "arguments.h"
#include "objects.h"

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

/* ---- opening -------------------------------------------------------------------------------------------- */

static PyObject *opened(Holder *holder, bool done)
{
    if (done)
        return (PyObject *)holder;
    ndm_i_refuse();
    Py_DECREF(holder);
    return NULL;
}

/* open_region(path or directory, temporary, the fields of ndm_options) -> Holder */
static PyObject *open_region(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    const char *name;
    int temporary;
    unsigned long long initial, maximum, alignment, limit, recover;
    if (!PyArg_ParseTuple(arguments, "ypKKKKK", &name, &temporary, &initial, &maximum, &alignment, &limit, &recover))
        return NULL;
    Holder *holder = ndm_i_holder_new();
    if (!holder)
        return NULL;
    const ndm_options options = {initial, maximum, alignment, limit, recover};
    Py_BEGIN_ALLOW_THREADS
    holder->region = temporary ? ndm_region_open_temporary(name, &options) : ndm_region_open(name, &options);
    Py_END_ALLOW_THREADS
    return opened(holder, holder->region != NULL);
}

/* open_reader(paths of data, slots and leases) -> Holder */
static PyObject *open_reader(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    const char *data, *slots, *leases;
    if (!PyArg_ParseTuple(arguments, "yyy", &data, &slots, &leases))
        return NULL;
    Holder *holder = ndm_i_holder_new();
    if (!holder)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    holder->reader = ndm_reader_open(data, slots, leases);
    Py_END_ALLOW_THREADS
    return opened(holder, holder->reader != NULL);
}

/* ---- writing -------------------------------------------------------------------------------------------- */

/* write(region, data, engine) -> slot */
static PyObject *write_value(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    Py_buffer data;
    int64_t engine, slot;
    ndm_region *region;
    if (!ndm_i_has_count(count, 3) || !(region = ndm_i_held_region(arguments[0])) || !ndm_i_get_number(arguments[2], &engine) ||
        !ndm_i_get_data(arguments[1], &data))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    slot = ndm_region_write(region, data.buf, (uint64_t)data.len, engine);
    Py_END_ALLOW_THREADS
    PyObject *result = slot < 0 ? ndm_i_refuse() : written(region, slot, Py_NewRef(Py_None));
    ndm_i_let_go(&data);
    return result;
}

/* write_many(region, buffers, engine) -> list of slots */
static PyObject *write_many(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    ndm_i_gathered all;
    int64_t engine, *slots = NULL;
    PyObject *result = NULL;
    ndm_region *region;
    if (!ndm_i_has_count(count, 3) || !(region = ndm_i_held_region(arguments[0])) || !ndm_i_get_number(arguments[2], &engine))
        return NULL;
    if (!ndm_i_gather(arguments[1], &all))
        goto end;
    if (!(slots = calloc((size_t)all.count, sizeof *slots))) {
        PyErr_NoMemory();
        goto end;
    }
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = ndm_region_write_many(region, all.parts, all.sizes, (uint64_t)all.count, engine, slots);
    Py_END_ALLOW_THREADS
    if (status < 0) {
        ndm_i_refuse();
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

/* What tells one value from a later one in the same slot, and the sizes of its parts. */
static PyObject *layout(ndm_region *region, int64_t slot, const ndm_i_gathered *all)
{
    ndm_slot facts = {0};
    ndm_region_slot(region, slot, &facts);
    PyObject *sizes = list_of_numbers((const int64_t *)all->sizes, all->count);
    return sizes ? Py_BuildValue("kN", (unsigned long)facts.generation, sizes) : NULL;
}

/* write_vectored(region, buffers, engine, aligned) -> slot, (generation, list of sizes) */
static PyObject *write_vectored(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    ndm_i_gathered all;
    int64_t engine, aligned, slot;
    PyObject *result = NULL;
    ndm_region *region;
    if (!ndm_i_has_count(count, 4) || !(region = ndm_i_held_region(arguments[0])) || !ndm_i_get_number(arguments[2], &engine) ||
        !ndm_i_get_number(arguments[3], &aligned))
        return NULL;
    if (ndm_i_gather(arguments[1], &all)) {
        Py_BEGIN_ALLOW_THREADS
        slot = ndm_region_write_vectored(region, all.parts, all.sizes, (uint64_t)all.count, aligned != 0, engine);
        Py_END_ALLOW_THREADS
        result = slot < 0 ? ndm_i_refuse() : written(region, slot, layout(region, slot, &all));
    }
    ndm_i_gathered_free(&all);
    return result;
}

/* allocate(region, size, engine) -> slot, memoryview */
static PyObject *allocate(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    int64_t size, engine, slot;
    char *address = NULL;
    ndm_region *region;
    View *view;
    if (!ndm_i_has_count(count, 3) || !(region = ndm_i_held_region(arguments[0])) || !ndm_i_get_number(arguments[1], &size) ||
        !ndm_i_get_number(arguments[2], &engine) || !(view = ndm_i_view_new(true)))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    slot = ndm_region_allocate(region, (uint64_t)size, engine, &address);
    Py_END_ALLOW_THREADS
    if (slot < 0) {
        ndm_i_refuse();
        Py_DECREF(view);
        return NULL;
    }
    view->address = address;
    view->size = (uint64_t)size;
    return written(region, slot, ndm_i_view_memory(view));
}

/* ---- reading -------------------------------------------------------------------------------------------- */

/* The memoryview of a view that the core was asked for; takes the caller's reference. */
static PyObject *viewed(View *view, const char *address, uint64_t size)
{
    if (!address) {
        ndm_i_refuse();
        Py_DECREF(view);
        return NULL;
    }
    view->address = address;
    view->size = size;
    return ndm_i_view_memory(view);
}

/* read(region, slot) -> memoryview */
static PyObject *read_value(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    int64_t slot;
    uint64_t size = 0;
    const char *address = NULL;
    ndm_region *region;
    View *view;
    if (!ndm_i_has_count(count, 2) || !(region = ndm_i_held_region(arguments[0])) || !ndm_i_get_slot(arguments[1], &slot) ||
        !(view = ndm_i_view_new(false)))
        return NULL;
    if (ndm_region_try_read(region, slot, &address, &size) == NDM_ERR_WAIT) {
        Py_BEGIN_ALLOW_THREADS
        address = ndm_region_read(region, slot, &size);
        Py_END_ALLOW_THREADS
    }
    return viewed(view, address, size);
}

/* restore(region, slot) -> memoryview */
static PyObject *restore(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    int64_t slot;
    uint64_t size = 0;
    const char *address;
    ndm_region *region;
    View *view;
    if (!ndm_i_has_count(count, 2) || !(region = ndm_i_held_region(arguments[0])) || !ndm_i_get_slot(arguments[1], &slot) ||
        !(view = ndm_i_view_new(true)))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    address = ndm_region_restore(region, slot, &size);
    Py_END_ALLOW_THREADS
    return viewed(view, address, size);
}

/* Memoryviews of views that the core has given; all are released where one cannot be had. The list is made when all are
 * there: a collection on the way would show it to others, half empty. */
static PyObject *list_of_views(const char **addresses, const uint64_t *sizes, Py_ssize_t count)
{
    PyObject **memories = calloc((size_t)count + 1, sizeof *memories), *list = NULL;
    Py_ssize_t made = 0, taken = 0;
    if (!memories)
        PyErr_NoMemory();
    while (memories && taken < count) {
        View *view = ndm_i_view_new(false);
        if (!view)
            break;
        PyObject *memory = viewed(view, addresses[taken], sizes[taken]);
        taken++;
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

/* read_many(region, buffer of int64) -> list of memoryviews */
static PyObject *read_many(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    Py_buffer slots;
    ndm_region *region;
    if (!ndm_i_has_count(count, 2) || !(region = ndm_i_held_region(arguments[0])) ||
        PyObject_GetBuffer(arguments[1], &slots, PyBUF_SIMPLE) != 0)
        return NULL;
    const Py_ssize_t total = slots.len / (Py_ssize_t)sizeof(int64_t);
    PyObject *result = NULL;
    const char **addresses = calloc((size_t)total + 1, sizeof *addresses);
    uint64_t *sizes = calloc((size_t)total + 1, sizeof *sizes);
    if (addresses && sizes) {
        int status;
        Py_BEGIN_ALLOW_THREADS
        status = ndm_region_read_many(region, slots.buf, (uint64_t)total, addresses, sizes);
        Py_END_ALLOW_THREADS
        result = status < 0 ? ndm_i_refuse() : list_of_views(addresses, sizes, total);
    } else {
        PyErr_NoMemory();
    }
    free(addresses);
    free(sizes);
    PyBuffer_Release(&slots);
    return result;
}

/* free(region, slot) */
static PyObject *free_value(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    int64_t slot;
    int status;
    ndm_region *region;
    if (!ndm_i_has_count(count, 2) || !(region = ndm_i_held_region(arguments[0])) || !ndm_i_get_slot(arguments[1], &slot))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = ndm_region_free(region, slot);
    Py_END_ALLOW_THREADS
    if (status < 0)
        return ndm_i_refuse();
    Py_RETURN_NONE;
}

/* ---- copies --------------------------------------------------------------------------------------------- */

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
    PyObject *bytes = NULL, *result = NULL;
    while (size > room) { /* again where a larger value has come meanwhile */
        Py_XDECREF(bytes);
        if (!(bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size)))
            return NULL;
        room = size;
        size = copy(from, PyBytes_AsString(bytes), room);
    }
    if (size < 0)
        ndm_i_refuse();
    else if (bytes && size == room)
        result = Py_NewRef(bytes);
    else
        result = PyBytes_FromStringAndSize(bytes ? PyBytes_AsString(bytes) : small, (Py_ssize_t)size);
    Py_XDECREF(bytes);
    return result;
}

/* read_bytes(region, slot) -> bytes */
static PyObject *read_bytes(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    source from = {.generation = -1};
    if (!ndm_i_has_count(count, 2) || !(from.region = ndm_i_held_region(arguments[0])) || !ndm_i_get_slot(arguments[1], &from.slot))
        return NULL;
    return bytes_of(&from);
}

/* read_into(region, slot, buffer) -> size */
static PyObject *read_into(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    source from = {.generation = -1};
    Py_buffer target;
    if (!ndm_i_has_count(count, 3) || !(from.region = ndm_i_held_region(arguments[0])) ||
        !ndm_i_get_slot(arguments[1], &from.slot) || !ndm_i_get_buffer(arguments[2], &target, PyBUF_WRITABLE))
        return NULL;
    PyObject *result = NULL;
    const int64_t size = copy(&from, target.buf, target.len);
    if (size < 0)
        ndm_i_refuse();
    else if (size > target.len)
        PyErr_Format(PyExc_ValueError, "slot %lld holds %lld bytes, the buffer has room for %zd", (long long)from.slot,
                     (long long)size, target.len);
    else
        result = PyLong_FromLongLong(size);
    PyBuffer_Release(&target);
    return result;
}

/* ---- readers -------------------------------------------------------------------------------------------- */

/* Every verb of a reader takes: reader, slot, generation. */
static bool get_shared(PyObject *const *arguments, Py_ssize_t count, source *from)
{
    from->region = NULL;
    return ndm_i_has_count(count, 3) && (from->reader = ndm_i_held_reader(arguments[0])) && ndm_i_get_slot(arguments[1], &from->slot) &&
           ndm_i_get_number(arguments[2], &from->generation);
}

static PyObject *view_shared(const source *from, ndm_value *value)
{
    const char *address;
    View *view = ndm_i_view_new(false);
    if (!view)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    address = ndm_reader_read(from->reader, from->slot, from->generation, value);
    Py_END_ALLOW_THREADS
    return viewed(view, address, value->size);
}

/* read_shared(reader, slot, generation) -> memoryview */
static PyObject *read_shared(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    source from;
    ndm_value value = {0};
    return get_shared(arguments, count, &from) ? view_shared(&from, &value) : NULL;
}

/* borrow(reader, slot, generation) -> memoryview, the bytes of an ndm_value */
static PyObject *borrow(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    source from;
    ndm_value value = {0};
    PyObject *result = NULL;
    PyObject *memory = get_shared(arguments, count, &from) ? view_shared(&from, &value) : NULL;
    PyObject *facts = memory ? PyBytes_FromStringAndSize((const char *)&value, sizeof value) : NULL;
    if (facts)
        result = PyTuple_Pack(2, memory, facts);
    Py_XDECREF(memory);
    Py_XDECREF(facts);
    return result;
}

/* lease(reader, slot, generation) -> memoryview */
static PyObject *lease(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    source from;
    ndm_value value = {0};
    const char *address = NULL;
    int64_t number;
    View *view;
    if (!get_shared(arguments, count, &from) || !(view = ndm_i_view_new(false)))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    number = ndm_reader_lease(from.reader, from.slot, from.generation, &address, &value);
    Py_END_ALLOW_THREADS
    if (number >= 0) {
        view->leased_by = (Holder *)Py_NewRef(arguments[0]);
        view->lease = number;
    }
    return viewed(view, address, value.size);
}

/* read_shared_bytes(reader, slot, generation) -> bytes */
static PyObject *read_shared_bytes(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    source from;
    return get_shared(arguments, count, &from) ? bytes_of(&from) : NULL;
}

/* ---- the module ----------------------------------------------------------------------------------------- */

#define FAST(name, function) {name, (PyCFunction)(void (*)(void))(function), METH_FASTCALL, NULL}

static PyMethodDef functions[] = {
    {"open_region", open_region, METH_VARARGS, NULL},
    {"open_reader", open_reader, METH_VARARGS, NULL},
    {"end_lease", ndm_i_end_lease, METH_O, NULL},
    FAST("write", write_value),
    FAST("write_many", write_many),
    FAST("write_vectored", write_vectored),
    FAST("allocate", allocate),
    FAST("read", read_value),
    FAST("read_bytes", read_bytes),
    FAST("read_many", read_many),
    FAST("read_into", read_into),
    FAST("restore", restore),
    FAST("free", free_value),
    FAST("read_shared", read_shared),
    FAST("read_shared_bytes", read_shared_bytes),
    FAST("borrow", borrow),
    FAST("lease", lease),
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "nodedb_mem._memory", .m_size = -1, .m_methods = functions};

PyMODINIT_FUNC PyInit__memory(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module && ndm_i_objects_add(module) < 0)
        Py_CLEAR(module);
    return module;
}
