/* The slot table: what each slot number stands for. It lives in a small mapped file of its own (`<path>.slots`,
 * unnamed for a temporary region), whose header also marks the data file as ours.
 *
 * A record is three 64-bit words, 24 bytes:
 *
 *   place   offset (48 bits)  moves (16)               where the value is, how often it was moved
 *   shape   size (48)  engine (8)  state (8)           what it is
 *   life    generation (32)  link (32)                 generation grows with each free
 *
 * `link` is the owner's own note: the slot's extent while live, the next free slot number after that.
 */
#ifndef NDM_SLOTS_H
#define NDM_SLOTS_H

#include "backing.h"

#include <stdbool.h>
#include <stdint.h>

#define NDM_I_NO_SLOT UINT32_MAX
#define NDM_I_SIZE_LIMIT ((uint64_t)1 << 48) /* offsets and sizes stay below */

typedef struct {
    uint64_t place, shape, life;
} ndm_i_record;

typedef struct {
    ndm_i_backing table;
    uint64_t count;      /* records ever used: slot numbers are below */
    uint64_t live;
    uint32_t first_free; /* chain of freed slot numbers, last freed first */
} ndm_i_slots;

enum { NDM_I_UNUSED, NDM_I_LIVE, NDM_I_FREED };

static inline uint64_t ndm_i_record_offset(const ndm_i_record *record) { return record->place & (NDM_I_SIZE_LIMIT - 1); }
static inline uint64_t ndm_i_record_size(const ndm_i_record *record) { return record->shape & (NDM_I_SIZE_LIMIT - 1); }
static inline uint8_t ndm_i_record_engine(const ndm_i_record *record) { return (uint8_t)(record->shape >> 48); }
static inline uint8_t ndm_i_record_state(const ndm_i_record *record) { return (uint8_t)(record->shape >> 56); }
static inline uint32_t ndm_i_record_generation(const ndm_i_record *record) { return (uint32_t)record->life; }
static inline uint32_t ndm_i_record_link(const ndm_i_record *record) { return (uint32_t)(record->life >> 32); }

/* Open the table of the data file at `path`. `path` NULL: unnamed. NDM_ERR_IO with EEXIST if the file there, or a
 * data file that has data, is not ours; then nothing has been touched. Leaves the data file alone. */
int ndm_i_slots_open(ndm_i_slots *slots, const char *path, const ndm_i_backing *data);

/* Empty the table and mark the data file as ours. */
int ndm_i_slots_start(ndm_i_slots *slots, const ndm_i_backing *data);

void ndm_i_slots_close(ndm_i_slots *slots, const char *unlink_path);

/* The record of a live or freed slot; NULL if there never was one. Good until the next reserve(). */
ndm_i_record *ndm_i_slots_record(const ndm_i_slots *slots, int64_t slot);

/* Make sure that the next `count` add()s need no room. */
int ndm_i_slots_reserve(ndm_i_slots *slots, uint64_t count);

/* The number that the next add() will give. */
uint32_t ndm_i_slots_next(const ndm_i_slots *slots);

/* Enter a value. Cannot fail after reserve(). Returns its number. */
uint32_t ndm_i_slots_add(ndm_i_slots *slots, uint64_t offset, uint64_t size, uint8_t engine, uint32_t extent);

/* Note that a live slot's value is elsewhere now. */
void ndm_i_slots_move(ndm_i_slots *slots, uint32_t slot, uint64_t offset, uint32_t extent);

/* Mark a live slot as freed. */
void ndm_i_slots_remove(ndm_i_slots *slots, uint32_t slot);

/* How many invariants of the table are broken. */
uint64_t ndm_i_slots_check(const ndm_i_slots *slots);

#endif
