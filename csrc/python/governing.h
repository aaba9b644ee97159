/* Governors and reservations as Python objects: what is called for each reservation.
 *
 *   Governor     the base of the Python class: its holder, and the verbs that are called often. What the core refuses goes
 *                to the Python class (_obtain), which asks reclaimers, waits, or raises.
 *   Reservation  bytes that are reserved, or a place in the line of those who wait for some. It keeps the holder, not the
 *                Python object, so that no cycle passes through it, and is there before the core is asked: no signal parts it
 *                from what the core gives. Collected before it was released, it gives its bytes back, is counted, and says
 *                so. It belongs to the process that made it: in a forked child it stands for nothing. */
#ifndef NDM_PYTHON_GOVERNING_H
#define NDM_PYTHON_GOVERNING_H

#include "objects.h"

typedef struct {
    PyObject_HEAD
    Holder *holder;
    PyObject *made; /* where, as a string; NULL: it was not noted */
    int64_t size, epoch;
    int64_t ticket, wanted; /* in the line, for so many bytes; 0: not there */
    int engine;
    bool held;
} Reservation;

extern PyMethodDef ndm_i_governing[];

/* Make the types. 0, or -1 with an exception. */
int ndm_i_governing_init(PyObject *module);
int ndm_i_reservation_init(PyObject *module);

/* A reservation of nothing yet. NULL with an exception. */
Reservation *ndm_i_reservation_new(Holder *holder, int64_t engine);

/* NULL with an exception for anything else. */
Reservation *ndm_i_as_reservation(PyObject *object);

/* Have it hold `size` bytes more. An ndm_status; the details of a refusal are noted. */
int64_t ndm_i_fill(Reservation *reservation, int64_t size, ndm_error *refusal);

/* Leave the line, and give back what it holds. Nobody is told. */
void ndm_i_let_go_of(Reservation *reservation);

/* The bytes of a refusal, as the Python class takes them. */
PyObject *ndm_i_details(const ndm_error *refusal);

/* A size from Python. false with a ValueError or TypeError. */
bool ndm_i_get_size(PyObject *object, int64_t *size);

/* Tell the facade that something of that engine has changed, if it wants to hear of it, or another process has asked for
 * bytes. An Exception is reported; false: another one is set, such as KeyboardInterrupt. */
bool ndm_i_attend(Holder *holder, int engine);

#endif
