/* Pins: the live views of each extent. Which addresses have been handed out, how often, and what happens when the last
 * view of an extent ends. One table for the process, guarded by a lock, because a view ends on whatever thread drops it.
 *
 * A view is known by its address alone, so that ndm_view_release() works like free(). Views of one extent may
 * have different addresses (an old mapping and its successor); they share one pin. An extent that is freed while
 * pinned is an orphan; when its pin ends it moves to its home's `returned` list, from where the owner collects
 * it without looking through anything.
 *
 * A forked child gets a copy of the table, and its views end there as they do in the parent; but they pin nothing for the
 * parent. After a raw clone(), which runs no fork handlers, every release in the child is a no-op.
 */
#ifndef NDM_PINS_H
#define NDM_PINS_H

#include "os/mapping.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct ndm_i_entry ndm_i_entry;

/* What the table knows of a region. Embedded in it. */
typedef struct ndm_i_home {
    _Atomic uint64_t users;          /* the open region, and each extent with a live view */
    _Atomic uint64_t writable;       /* of these extents, those with a view that stores to the file */
    _Atomic(ndm_i_entry *) returned; /* orphans whose last view has ended, for the owner to collect */
    void (*last)(struct ndm_i_home *home); /* called when `users` reaches 0: once, on any thread, without the lock */
} ndm_i_home;

/* What a view of an empty value points to: no pin has this address. */
extern char ndm_i_empty_view[1];

/* false: no memory. */
bool ndm_i_home_init(ndm_i_home *home, void (*last)(ndm_i_home *));

/* The region, or a pin, no longer uses its home: calls last() if that was the last user. */
void ndm_i_home_leave(ndm_i_home *home);

/* Record a view of `extent` at `address` inside `mapping`; `writable` if stores to it reach the file. The pages of the
 * first `forget` bytes leave the process's RSS with the last view at that address; if `wide`, with all of their 2 MiB. false:
 * no memory. Owner only. */
bool ndm_i_pins_add(ndm_i_home *home, uint32_t extent, ndm_i_mapping *mapping, const void *address, uint64_t forget,
                    bool wide, bool writable);

/* End one view. Any thread. false, and nothing is done, if that would unmap memory and `may_unmap` is not set. */
bool ndm_i_pins_drop(const void *address, bool may_unmap);

/* Has any extent a live view? Owner only; "no" stays true until the owner adds one. */
static inline bool ndm_i_pins_any(const ndm_i_home *home)
{
    return atomic_load_explicit(&home->users, memory_order_acquire) > 1;
}

/* Has the extent a live view? Owner only; the answer "no" stays true until the owner adds one. */
bool ndm_i_pins_pinned(ndm_i_home *home, uint32_t extent);

/* Has any extent a writable view? Owner only; "no" stays true until the owner adds one. */
bool ndm_i_pins_writable(ndm_i_home *home);

/* The extent is being freed: true if a live view keeps it, which makes it an orphan. Owner only. */
bool ndm_i_pins_orphan(ndm_i_home *home, uint32_t extent);

/* How many views keep orphans of this home? Owner only; linear in the pins of the process. */
uint64_t ndm_i_pins_orphan_views(ndm_i_home *home);

/* Has an orphan's last view ended? Any thread; for the owner, "no" may be old. */
static inline bool ndm_i_pins_have_returned(const ndm_i_home *home)
{
    return atomic_load_explicit(&home->returned, memory_order_acquire) != NULL;
}

/* Take one orphan whose views have all ended off the list; false when there is none. Owner only. */
bool ndm_i_pins_collect(ndm_i_home *home, uint32_t *extent);

/* How many invariants of the home's pins are broken: each pin has views, the counts are right, and `is_sound` says yes to
 * each pinned extent, and whether it is an orphan. Owner only; views may end on other threads meanwhile. */
uint64_t ndm_i_pins_check(ndm_i_home *home, bool (*is_sound)(void *context, uint32_t extent, bool orphan), void *context);

#endif
