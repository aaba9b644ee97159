/* What the verbs of reserve.c and the waiters share. */
#ifndef NDM_GOVERNOR_RESERVE_H
#define NDM_GOVERNOR_RESERVE_H

#include "governor/governor.h"

#define NDM_I_NO_TICKET UINT64_MAX /* comes after everybody who waits */

/* Reserve, with the lock. NDM_ERR_ENGINE, NDM_ERR_BUDGET, NDM_ERR_CEILING, NDM_ERR_IO (no row is free). */
int ndm_i_budget_take(ndm_governor *governor, uint32_t engine, uint64_t size, uint64_t ticket);

/* NDM_ERR_BUDGET or NDM_ERR_CEILING if it would be refused though nobody held anything. */
int ndm_i_can_ever_fit(ndm_governor *governor, uint32_t engine, uint64_t size);

/* NDM_ERR_CLOSED, NDM_ERR_ARGUMENT. */
int ndm_i_check_call(const ndm_governor *governor, int64_t engine, uint64_t size);

#endif
