/* Governors by number, for code that holds no pointer. Any thread may use one: calls are counted, and the end waits. */
#ifndef NDM_GOVERNOR_NUMBER_H
#define NDM_GOVERNOR_NUMBER_H

#include "nodedb_mem.h"

/* The governor, which stays until ndm_i_number_end(). NULL: NDM_ERR_CLOSED. */
ndm_governor *ndm_i_number_begin(uint64_t number);
void ndm_i_number_end(uint64_t number);

/* The number is nobody's from now on; returns when no call by it is running. */
void ndm_i_number_retire(ndm_governor *governor);

/* In a forked child: the calls by the number were those of threads that are not here. */
void ndm_i_number_renew(ndm_governor *governor);

#endif
