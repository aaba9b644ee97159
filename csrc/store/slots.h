/* The slot table: what each slot number stands for. It lives in a small mapped file of its own (`<path>.slots`,
 * in memory for a temporary region), written by the owner alone and read by readers in any process (reader.c). Its
 * header also marks the data file as ours.
 *
 * A record is three 64-bit words, 24 bytes:
 *
 *   place   offset (48 bits)  moves (16)               where the value is, how often it was moved
 *   shape   size (48)  engine (8)  state (8)           what it is
 *   life    generation (32)  link (32)                 generation grows with each free
 *
 * Neither counter shows an old value twice. A slot whose generation has come to NDM_I_LAST_GENERATION is retired: it stays
 * FREED, and is never given out again. When the moves of a value begin anew at 0, the header's `turns` has grown before: a
 * reader that finds another number of turns takes the value for moved. A value may be moved 65536 times while a reader
 * looks at it; a slot is retired after 2^32 frees, which takes minutes.
 *
 * `link` is the owner's own note: the slot's extent while live, the next free slot number after that.
 *
 * Memory order. The owner takes no lock. It publishes a value by storing place and life, then shape with the state LIVE
 * (release). It withdraws one by storing shape with another state, then a release fence; only after that may the
 * value's bytes change, and the generation has grown before the slot is LIVE again. So a reader that loads life, shape
 * (LIVE) and place (acquire), then reads the bytes, then an acquire fence, then finds the three unchanged, has read the
 * bytes of that very value: had it seen a newer byte, it would also see the withdrawal that came before it. A move
 * goes the same way, by way of the state MOVING. `link` may change at any time and is not compared.
 */
#ifndef NDM_SLOTS_H
#define NDM_SLOTS_H

#include "os/file.h"

#include <stdbool.h>
#include <stdint.h>

#define NDM_I_NO_SLOT UINT32_MAX
#define NDM_I_LAST_GENERATION UINT32_MAX /* no value has it */
#define NDM_I_SIZE_LIMIT ((uint64_t)1 << 48) /* offsets and sizes stay below */
#define NDM_I_HEADER_ROOM ((uint64_t)4096)

enum { NDM_I_UNUSED, NDM_I_LIVE, NDM_I_FREED, NDM_I_DRAFT, NDM_I_MOVING };

typedef struct {
    _Atomic uint64_t place, shape, life;
} ndm_i_record;

/* The table's first page. All but the atomic fields stay as they are while the incarnation does. Up to `incarnation` it
 * is the same in every version.
 *
 * A table of another version is never read. An owner that starts afresh replaces an older one: this library knows
 * that all of it may go. A newer one it refuses, untouched: what that version keeps in its files besides, and who may
 * be relying on it, this library cannot know. */
typedef struct {
    char magic[8];
    uint32_t version;
    uint32_t byte_order;
    uint32_t page_size;
    uint32_t record_size;
    uint64_t alignment;
    _Atomic uint64_t inode; /* of the data file, with its time of birth: inode numbers are reused */
    _Atomic uint64_t born;
    _Atomic uint64_t incarnation; /* a new random number each time the region is opened afresh; 0: none is valid */
    _Atomic uint64_t count;       /* records ever used */
    _Atomic uint64_t capacity, max_capacity, used_bytes, live_bytes; /* of the region */
    _Atomic uint64_t owner;       /* process id; 0 once closed */
    /* A move under way: the first `moved` bytes of the value are at `move_to` already. */
    _Atomic uint64_t move_slot; /* plus 1; 0: none */
    _Atomic uint64_t move_from, move_to, moved;
    _Atomic uint64_t pinned_bytes; /* of the region, as those above */
    /* Which data file this table speaks of: see kinship.h. */
    _Atomic uint64_t identity[2];        /* that the file bears; 0: it bears none, inode and birth count */
    _Atomic uint64_t identity_before[2]; /* while it is being given another */
    _Atomic uint64_t closed_at;          /* time of the file's last change when the region was closed; 0: it was not */
    _Atomic uint64_t has_leases;         /* 1: a leases file was made */
    _Atomic uint64_t turns;              /* how often a value's moves have begun anew */
} ndm_i_header;

/* What stands where the table belongs. */
typedef enum {
    NDM_I_NO_TABLE,     /* nothing */
    NDM_I_VACANT_TABLE, /* a table of ours that holds no values: its owner died while it opened the region */
    NDM_I_OLDER_TABLE,  /* of a former version */
    NDM_I_TABLE
} ndm_i_found_table;

typedef struct {
    ndm_i_file table;
    uint64_t count;      /* records ever used: slot numbers are below */
    uint64_t live;
    uint64_t retired;
    uint32_t first_free; /* chain of freed slot numbers, last freed first */
    bool started;        /* its header may be stored to */
    ndm_i_found_table found;
    ndm_i_header before; /* of the table that was found */
    bool named;          /* the table has a path */
} ndm_i_slots;

static inline uint64_t ndm_i_word(const _Atomic uint64_t *word) { return atomic_load_explicit(word, memory_order_relaxed); }

#define NDM_I_RECORD_FIELD(name, type, word, expression)            \
    static inline type ndm_i_record_##name(const ndm_i_record *record) \
    {                                                                \
        const uint64_t bits = ndm_i_word(&record->word);             \
        return (type)(expression);                                   \
    }
NDM_I_RECORD_FIELD(offset, uint64_t, place, bits & (NDM_I_SIZE_LIMIT - 1))
NDM_I_RECORD_FIELD(size, uint64_t, shape, bits & (NDM_I_SIZE_LIMIT - 1))
NDM_I_RECORD_FIELD(engine, uint8_t, shape, bits >> 48)
NDM_I_RECORD_FIELD(state, uint8_t, shape, bits >> 56)
NDM_I_RECORD_FIELD(generation, uint32_t, life, bits)
NDM_I_RECORD_FIELD(link, uint32_t, life, bits >> 32)
#undef NDM_I_RECORD_FIELD

/* A value of the owner's: LIVE, or a DRAFT that readers do not see yet. */
static inline bool ndm_i_record_is_live(const ndm_i_record *record)
{
    const uint8_t state = ndm_i_record_state(record);
    return state == NDM_I_LIVE || state == NDM_I_DRAFT;
}

/* Open the table at `path`, and make the file if `create` is set; `path` NULL: in memory. NDM_ERR_IO with EEXIST if the
 * file there is not a table, with EUCLEAN if it is cut off within the header, with EINVAL if it is of a newer version, with
 * ENOENT if it is missing; then nothing has been touched. */
int ndm_i_slots_open(ndm_i_slots *slots, const char *path, bool create);

/* To empty the table takes three steps. The first does what may be refused: it gets room and maps the table; its values
 * stay as they are. The second tells readers that the values are gone. The third, when they may go, marks the data file as
 * ours and empties the table. */
int ndm_i_slots_prepare(ndm_i_slots *slots, const ndm_i_file *data);
void ndm_i_slots_invalidate(ndm_i_slots *slots);
int ndm_i_slots_start(ndm_i_slots *slots, const ndm_i_file *data, uint64_t alignment);

/* Look at the table as a dead owner left it, and map it. NDM_ERR_IO with EINVAL if it is not one, EUCLEAN if it is torn.
 * The caller looks through the records; once nothing can be refused any more, it takes the table over. */
int ndm_i_slots_adopt(ndm_i_slots *slots, const ndm_i_file *data);
void ndm_i_slots_take_over(ndm_i_slots *slots, const ndm_i_file *data);

/* The owner will store no more: note whether the data file is as the table says. */
void ndm_i_slots_seal(ndm_i_slots *slots, const ndm_i_file *data);

void ndm_i_slots_close(ndm_i_slots *slots, const char *unlink_path);

/* Is nobody reading? Then no reader comes until ndm_i_slots_let_readers(). */
bool ndm_i_slots_bar_readers(ndm_i_slots *slots);
void ndm_i_slots_let_readers(ndm_i_slots *slots);

ndm_i_header *ndm_i_slots_header(const ndm_i_slots *slots);

/* Is this the header of a table that this library can read, and that speaks of this data file? Else a status with the
 * error set. */
int ndm_i_header_check(const ndm_i_header *header, const ndm_i_file *data);

/* Is this an alignment of values? A table may hold any number. */
static inline bool ndm_i_is_alignment(uint64_t number)
{
    return number != 0 && number <= 4096 && (number & (number - 1)) == 0;
}

/* The record of a live or freed slot; NULL if there never was one. Good until the next reserve(). */
ndm_i_record *ndm_i_slots_record(const ndm_i_slots *slots, int64_t slot);

/* Make sure that the next `count` add()s need no room. */
int ndm_i_slots_reserve(ndm_i_slots *slots, uint64_t count);

/* Enter a value, LIVE or DRAFT. Cannot fail after reserve(). Returns its number. */
uint32_t ndm_i_slots_add(ndm_i_slots *slots, uint64_t offset, uint64_t size, uint8_t engine, uint32_t extent,
                         uint8_t state);

/* A draft is complete. */
void ndm_i_slots_commit(ndm_i_slots *slots, uint32_t slot);

/* A live slot's bytes are about to move to `offset`; they have; they have not, after all. */
void ndm_i_slots_move_begin(ndm_i_slots *slots, uint32_t slot, uint64_t offset);
void ndm_i_slots_move_end(ndm_i_slots *slots, uint32_t slot, uint64_t offset, uint32_t extent);
void ndm_i_slots_move_cancel(ndm_i_slots *slots, uint32_t slot);

/* Mark a live slot as freed; or retire it, at its last generation. */
void ndm_i_slots_remove(ndm_i_slots *slots, uint32_t slot);

/* Set a live slot's extent. */
void ndm_i_slots_set_extent(ndm_i_slots *slots, uint32_t slot, uint32_t extent);

/* Count the live slots of an adopted table and chain the others, which are FREED from now on. */
void ndm_i_slots_rebuild(ndm_i_slots *slots);

/* How many invariants of the table are broken. */
uint64_t ndm_i_slots_check(const ndm_i_slots *slots);

#endif
