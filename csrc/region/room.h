/* Room for values, wherever it lies: what the ledger cannot take as it is, is made by moving values together.
 *
 * Verbs that write come here. Nothing is moved unless the request will fit then.
 */
#ifndef NDM_ROOM_H
#define NDM_ROOM_H

#include "region/ledger.h"

/* As ndm_i_take(); but a request that the ceiling or the disk refuses is met from scattered free space, if there is as much
 * between values that must stay where they are. A slot table for which the disk has no block left gets those that the data
 * file has ahead of its values. */
int ndm_i_room_make(ndm_region *region, ndm_i_room *rooms, uint64_t count, ndm_i_before *before, int status);

static inline int ndm_i_room_take(ndm_region *region, ndm_i_room *rooms, uint64_t count, ndm_i_before *before)
{
    const int status = ndm_i_take(region, rooms, count, before);
    return status == NDM_OK ? NDM_OK : ndm_i_room_make(region, rooms, count, before, status);
}

/* The bytes could not be stored, and `status` says why. If the disk is full, all goes back and other room is made, of space
 * that has blocks. true: it has been taken, and the bytes are to be stored again; false: ndm_i_undo() is due as ever. */
bool ndm_i_room_other(ndm_region *region, ndm_i_room *rooms, uint64_t count, ndm_i_before *before, int status);

#endif
