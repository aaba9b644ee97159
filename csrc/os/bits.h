/* Arithmetic that every room needs. */
#ifndef NDM_BITS_H
#define NDM_BITS_H

#include <stdbool.h>
#include <stdint.h>

static inline uint64_t ndm_i_min(uint64_t a, uint64_t b) { return a < b ? a : b; }

static inline uint64_t ndm_i_max(uint64_t a, uint64_t b) { return a > b ? a : b; }

/* To a multiple of `step`, any positive number. */
static inline uint64_t ndm_i_round_up(uint64_t value, uint64_t step) { return (value + step - 1) / step * step; }

static inline uint64_t ndm_i_round_down(uint64_t value, uint64_t step) { return value / step * step; }

static inline bool ndm_i_is_power_of_two(uint64_t value) { return value != 0 && (value & (value - 1)) == 0; }

#endif
