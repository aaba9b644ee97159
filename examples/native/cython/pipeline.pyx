# cython: language_level=3, boundscheck=False
"""Rows to slots and back in Cython, without the interpreter: the header's functions are cimported."""

from libc.stdint cimport int64_t, uint8_t, uint64_t
from nodedb_mem cimport NDM_CHECK_ABI, ndm_h_pin, ndm_h_write, ndm_last_error, ndm_region_unpin

from nodedb_mem.errors import raise_status

if NDM_CHECK_ABI() < 0:
    raise ImportError("compiled for another nodedb_mem")


def spill_rows(uint64_t handle, const double[:, ::1] rows, int64_t engine, int64_t[::1] slots):
    """Write each row into a slot."""
    cdef Py_ssize_t i
    cdef uint64_t size = rows.shape[1] * sizeof(double)
    cdef int64_t status = 0
    if slots.shape[0] < rows.shape[0]:
        raise ValueError("a slot for each row is needed")
    with nogil:
        for i in range(rows.shape[0]):
            status = ndm_h_write(handle, <const uint8_t *>&rows[i, 0], size, engine)
            if status < 0:
                break
            slots[i] = status
    if status < 0:
        raise_status(status)


def sum_row(uint64_t handle, int64_t slot):
    """Sum a row where it lies."""
    cdef uint64_t size = 0, i
    cdef double total = 0
    cdef const uint8_t *data
    cdef const double *row
    data = ndm_h_pin(handle, slot, &size)
    if data == NULL:
        raise_status(ndm_last_error().status)
    row = <const double *>data
    with nogil:
        for i in range(size // sizeof(double)):
            total += row[i]
        ndm_region_unpin(data)
    return total
