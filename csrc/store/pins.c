/* See pins.h. */
#include "store/pins.h"

#include "os/fork.h"
#include "os/owner.h"

#include <assert.h>
#include <pthread.h>
#include <stdlib.h>

enum { FIRST_BUCKETS = 256, MOST_SPARES = 256 };

#define VIEW UINT32_MAX

/* A view (where = its address, pin = its extent's pin) or a pin (where = its home, extent = which one). */
struct ndm_i_entry {
    struct ndm_i_entry *next;
    const void *where;
    uint64_t forget; /* view: so many bytes leave the RSS with it; pin: the checker counts its views here */
    uint64_t count;  /* view: times handed out; pin: views of it */
    struct ndm_i_entry *pin;
    union {
        ndm_i_mapping *mapping; /* view */
        ndm_i_home *home;       /* pin */
    };
    uint32_t extent; /* VIEW for a view */
    bool orphan;     /* pin: freed by the owner */
    bool writable;   /* pin: counted in home->writable */
    bool wide;       /* view: all of its 2 MiB leave the RSS with it */
};

struct table {
    uint64_t process;
    pthread_mutex_t lock;
    struct ndm_i_entry **buckets;
    uint64_t bucket_count; /* a power of two */
    uint64_t entry_count;
    struct ndm_i_entry *spares; /* unused entries: views come and go faster than malloc */
    uint64_t spare_count;
    ndm_i_fork_entry at_fork; /* its lock is held across a fork: the child finds the table whole, and its views end there */
};

static _Atomic(struct table *) current;

char ndm_i_empty_view[1];

static void table_is_childs(void *table) { ((struct table *)table)->process = ndm_i_process(); }

static struct table *table_new(uint64_t process)
{
    struct table *table = calloc(1, sizeof *table);
    if (!table)
        return NULL;
    table->process = process;
    table->bucket_count = FIRST_BUCKETS;
    table->buckets = calloc(FIRST_BUCKETS, sizeof *table->buckets);
    if (!table->buckets) {
        free(table);
        return NULL;
    }
    pthread_mutex_init(&table->lock, NULL);
    table->at_fork = (ndm_i_fork_entry){.in_child = table_is_childs, .context = table, .lock = &table->lock};
    return table;
}

/* This process's table. One inherited by a raw clone(), which ran no handlers, is abandoned: its lock may be held by a
 * thread that is gone. */
static struct table *table_here(void)
{
    struct table *table = atomic_load(&current);
    if (table && ndm_i_is_process(table->process))
        return table;
    struct table *fresh = table_new(ndm_i_process());
    if (!fresh)
        return NULL;
    if (atomic_compare_exchange_strong(&current, &table, fresh)) {
        ndm_i_fork_add(&fresh->at_fork);
        return fresh;
    }
    free(fresh->buckets);
    free(fresh);
    return table;
}

static struct ndm_i_entry **bucket(struct table *table, const void *where, uint32_t extent)
{
    uint64_t hash = ((uint64_t)(uintptr_t)where ^ ((uint64_t)extent << 32)) * 0x9E3779B97F4A7C15u;
    return &table->buckets[(hash >> 32) & (table->bucket_count - 1)]; /* an extent reaches no lower bit */
}

/* The link that points to the entry, or to the end of its chain. */
static struct ndm_i_entry **find(struct table *table, const void *where, uint32_t extent)
{
    struct ndm_i_entry **link = bucket(table, where, extent);
    while (*link && ((*link)->where != where || (*link)->extent != extent))
        link = &(*link)->next;
    return link;
}

static void widen(struct table *table)
{
    struct ndm_i_entry **old = table->buckets;
    uint64_t old_count = table->bucket_count;
    struct ndm_i_entry **wide = calloc(old_count * 2, sizeof *wide);
    if (!wide)
        return; /* longer chains are slower, not wrong */
    table->buckets = wide;
    table->bucket_count = old_count * 2;
    for (uint64_t i = 0; i < old_count; i++) {
        while (old[i]) {
            struct ndm_i_entry *entry = old[i];
            old[i] = entry->next;
            struct ndm_i_entry **link = bucket(table, entry->where, entry->extent);
            entry->next = *link;
            *link = entry;
        }
    }
    free(old);
}

/* Hang an entry on the end of its chain that find() gave. */
static void insert(struct table *table, struct ndm_i_entry **link, struct ndm_i_entry *entry)
{
    entry->next = NULL;
    *link = entry;
    if (++table->entry_count > table->bucket_count)
        widen(table);
}

static bool fill_spares(struct table *table, uint64_t count)
{
    while (table->spare_count < count) {
        struct ndm_i_entry *entry = malloc(sizeof *entry);
        if (!entry)
            return false;
        entry->next = table->spares;
        table->spares = entry;
        table->spare_count++;
    }
    return true;
}

static struct ndm_i_entry *take_spare(struct table *table)
{
    struct ndm_i_entry *entry = table->spares;
    assert(entry && table->spare_count > 0);
    table->spares = entry->next;
    table->spare_count--;
    return entry;
}

static void give_spare(struct table *table, struct ndm_i_entry *entry)
{
    if (table->spare_count == MOST_SPARES) {
        free(entry);
        return;
    }
    entry->next = table->spares;
    table->spares = entry;
    table->spare_count++;
}

bool ndm_i_home_init(ndm_i_home *home, void (*last)(ndm_i_home *))
{
    atomic_init(&home->users, 1);
    atomic_init(&home->writable, 0);
    atomic_init(&home->returned, NULL);
    home->last = last;
    return table_here() != NULL; /* before what rests on it is listed for forks */
}

/* Drop a use that is not the last one. */
static bool leave_shared(ndm_i_home *home)
{
    uint64_t users = atomic_load(&home->users);
    while (users > 1)
        if (atomic_compare_exchange_weak(&home->users, &users, users - 1))
            return true;
    return false;
}

void ndm_i_home_leave(ndm_i_home *home)
{
    if (leave_shared(home))
        return;
    ndm_i_fork_bar(); /* a child has no home without a user, whose last() has not been called */
    if (atomic_fetch_sub(&home->users, 1) == 1)
        home->last(home);
    ndm_i_fork_let();
}

bool ndm_i_pins_add(ndm_i_home *home, uint32_t extent, ndm_i_mapping *mapping, const void *address, uint64_t forget,
                    bool wide, bool writable)
{
    struct table *table = table_here();
    if (!table)
        return false;
    pthread_mutex_lock(&table->lock);
    struct ndm_i_entry **link = find(table, address, VIEW);
    bool added = true;
    if (*link) {
        (*link)->count++;
    } else if ((added = fill_spares(table, 2))) {
        struct ndm_i_entry *view = take_spare(table);
        *view = (struct ndm_i_entry){
            .where = address, .forget = forget, .count = 1, .mapping = mapping, .extent = VIEW, .wide = wide};
        ndm_i_mapping_ref(mapping);
        insert(table, link, view);
        link = find(table, home, extent);
        struct ndm_i_entry *pin = *link;
        if (!pin) {
            pin = take_spare(table);
            *pin = (struct ndm_i_entry){.where = home, .home = home, .extent = extent};
            atomic_fetch_add(&home->users, 1);
            insert(table, link, pin);
        }
        pin->count++;
        view->pin = pin;
        if (writable && !pin->writable) {
            pin->writable = true;
            atomic_fetch_add(&home->writable, 1);
        }
    }
    pthread_mutex_unlock(&table->lock);
    return added;
}

/* Is the view the last of what keeps its pages, its mapping or its file? With the lock held. */
static bool unmaps(const struct ndm_i_entry *view)
{
    const struct ndm_i_entry *pin = view->pin;
    return view->count == 1 && (view->forget > 0 || atomic_load(&view->mapping->users) == 1 ||
                                (pin->count == 1 && atomic_load(&pin->home->users) == 1));
}

/* Take a pin without views out of the table, with the lock held. */
static inline void pin_ends(struct table *table, struct ndm_i_entry *pin)
{
    ndm_i_home *home = pin->home;
    *find(table, home, pin->extent) = pin->next;
    table->entry_count--;
    if (pin->writable)
        atomic_fetch_sub(&home->writable, 1);
    if (pin->orphan) {
        pin->next = atomic_load(&home->returned);
        atomic_store(&home->returned, pin);
    } else {
        give_spare(table, pin);
    }
}

/* What is left to do when a view has left the table, and the lock is free. */
struct ending {
    uint64_t forget;
    bool wide;
    ndm_i_mapping *mapping; /* NULL: its use has been dropped */
    ndm_i_home *home;       /* the same */
};

/* End one view, with the lock held, for which forks wait: what only counts is done at once. */
static inline void view_ends(struct table *table, struct ndm_i_entry **link, struct ending *ending)
{
    struct ndm_i_entry *view = *link, *pin = view->pin;
    *link = view->next;
    table->entry_count--;
    assert(pin->count > 0 && pin->extent != VIEW);
    ndm_i_home *home = --pin->count == 0 ? pin->home : NULL;
    if (home)
        pin_ends(table, pin);
    *ending = (struct ending){.forget = view->forget, .wide = view->wide, .mapping = view->mapping, .home = home};
    give_spare(table, view);
    if (ending->forget == 0 && ndm_i_mapping_unref_shared(ending->mapping)) /* what is forgotten has to be there still */
        ending->mapping = NULL;
    if (home && leave_shared(home))
        ending->home = NULL;
}

bool ndm_i_pins_drop(const void *address, bool may_unmap)
{
    struct table *table = atomic_load(&current);
    if (!table || !ndm_i_is_process(table->process))
        return true;
    struct ending ending = {.forget = 0};

    pthread_mutex_lock(&table->lock);
    struct ndm_i_entry **link = find(table, address, VIEW);
    const bool last = *link && unmaps(*link), refused = last && !may_unmap;
    if (last && may_unmap) { /* a child finds the view with its mapping and its home, or none of them */
        pthread_mutex_unlock(&table->lock);
        ndm_i_fork_bar();
        pthread_mutex_lock(&table->lock);
        link = find(table, address, VIEW);
    }
    const bool ends = *link && !refused && --(*link)->count == 0; /* none: a view of before a fork, in the child */
    if (ends)
        view_ends(table, link, &ending);
    pthread_mutex_unlock(&table->lock);

    if (ending.forget > 0)
        ndm_i_mapping_forget(ending.mapping, address, ending.forget, ending.wide);
    if (ending.mapping)
        ndm_i_mapping_unref(ending.mapping);
    if (ending.home)
        ndm_i_home_leave(ending.home);
    if (last && may_unmap)
        ndm_i_fork_let();
    return !refused;
}

/* The pin of an extent, NULL if it has none; with the lock held. */
static struct ndm_i_entry *locked_pin(ndm_i_home *home, uint32_t extent, struct table **locked)
{
    *locked = NULL;
    if (!ndm_i_pins_any(home))
        return NULL;
    struct table *table = table_here();
    pthread_mutex_lock(&table->lock); /* there are pins, so the table exists */
    *locked = table;
    return *find(table, home, extent);
}

bool ndm_i_pins_pinned(ndm_i_home *home, uint32_t extent)
{
    struct table *locked;
    bool pinned = locked_pin(home, extent, &locked) != NULL;
    if (locked)
        pthread_mutex_unlock(&locked->lock);
    return pinned;
}

bool ndm_i_pins_writable(ndm_i_home *home) { return atomic_load(&home->writable) > 0; }

bool ndm_i_pins_orphan(ndm_i_home *home, uint32_t extent)
{
    struct table *locked;
    struct ndm_i_entry *pin = locked_pin(home, extent, &locked);
    assert(!pin || !pin->orphan);
    if (pin)
        pin->orphan = true;
    if (locked)
        pthread_mutex_unlock(&locked->lock);
    return pin != NULL;
}

bool ndm_i_pins_collect(ndm_i_home *home, uint32_t *extent)
{
    if (!ndm_i_pins_have_returned(home))
        return false;
    struct table *table = table_here();
    pthread_mutex_lock(&table->lock);
    struct ndm_i_entry *pin = atomic_load(&home->returned);
    atomic_store(&home->returned, pin->next);
    *extent = pin->extent;
    give_spare(table, pin);
    pthread_mutex_unlock(&table->lock);
    return true;
}

uint64_t ndm_i_pins_orphan_views(ndm_i_home *home)
{
    uint64_t views = 0;
    if (!ndm_i_pins_any(home))
        return 0;
    struct table *table = table_here();
    pthread_mutex_lock(&table->lock);
    for (uint64_t i = 0; i < table->bucket_count; i++)
        for (const struct ndm_i_entry *entry = table->buckets[i]; entry; entry = entry->next)
            if (entry->extent == VIEW && entry->pin->home == home && entry->pin->orphan)
                views += entry->count;
    pthread_mutex_unlock(&table->lock);
    return views;
}

uint64_t ndm_i_pins_check(ndm_i_home *home, bool (*is_sound)(void *context, uint32_t extent, bool orphan), void *context)
{
    struct table *table = table_here();
    uint64_t broken = 0, pins = 0, writable = 0, entries = 0;
    if (!table)
        return 0;
    pthread_mutex_lock(&table->lock);
    for (uint64_t i = 0; i < table->bucket_count; i++)
        for (struct ndm_i_entry *entry = table->buckets[i]; entry; entry = entry->next)
            if (entry->extent == VIEW)
                entry->pin->forget++;
    for (uint64_t i = 0; i < table->bucket_count; i++) {
        for (struct ndm_i_entry *entry = table->buckets[i]; entry; entry = entry->next) {
            entries++;
            if (entry->extent == VIEW)
                continue;
            const uint64_t views = entry->forget;
            entry->forget = 0;
            if (entry->home != home)
                continue;
            pins++;
            writable += entry->writable;
            broken += views == 0 || views != entry->count;
            broken += !is_sound(context, entry->extent, entry->orphan);
        }
    }
    broken += entries != table->entry_count;
    broken += atomic_load(&home->writable) != writable;
    broken += atomic_load(&home->users) < pins + 1; /* a pin that has just ended still counts as a user for a moment */
    pthread_mutex_unlock(&table->lock);
    return broken;
}
