/* Free space against a model that searches a plain list: every input is a sequence of operations, and after each one
 * the structure is checked and compared with the model, extent by extent. Built and run by `make fuzz`. */
#include "store/extents.h"
#include "store/extents_check.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NONE NDM_I_NONE
#define PASSING (1u << 30) /* the tag of what is given back at once */
#define MOST 512 /* extents; further ones are not taken */
#define CHECK(condition)                                                   \
    do {                                                                   \
        if (!(condition)) {                                                \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                       \
        }                                                                  \
    } while (0)

struct piece {
    uint64_t offset, length;
    uint32_t extent, tag;
    bool used;
};

static struct piece model[MOST + 1];
static size_t count;

static void model_insert(size_t at, struct piece piece)
{
    memmove(&model[at + 1], &model[at], (count - at) * sizeof *model);
    model[at] = piece;
    count++;
}

static void model_remove(size_t at)
{
    memmove(&model[at], &model[at + 1], (count - at - 1) * sizeof *model);
    count--;
}

static void model_join(size_t at)
{
    if (at + 1 < count && !model[at].used && !model[at + 1].used) {
        model[at].length += model[at + 1].length;
        model_remove(at + 1);
    }
}

static uint64_t model_mark(void) { return count ? model[count - 1].offset + model[count - 1].length : 0; }

/* The nth piece that is used (or free), counted from `nth` modulo how many there are; `count` if there is none. */
static size_t pick(bool used, uint64_t nth)
{
    size_t matches = 0;
    for (size_t i = 0; i < count; i++)
        matches += model[i].used == used;
    if (matches == 0)
        return count;
    nth %= matches;
    for (size_t i = 0;; i++)
        if (model[i].used == used && nth-- == 0)
            return i;
}

static void compare(ndm_i_extents *extents)
{
    uint64_t free_units = 0, largest = 0;
    uint32_t extent = ndm_i_extents_first(extents), before = NONE, first_hole = NONE;
    CHECK(ndm_i_extents_check(extents) == 0);
    for (size_t i = 0; i < count; i++) {
        CHECK(extent != NONE);
        CHECK(ndm_i_extents_offset(extents, extent) == model[i].offset);
        CHECK(ndm_i_extents_length(extents, extent) == model[i].length);
        CHECK(ndm_i_extents_is_free(extents, extent) == !model[i].used);
        CHECK(ndm_i_extents_previous(extents, extent) == before);
        CHECK(ndm_i_extents_tag(extents, extent) == (model[i].used ? model[i].tag : NONE));
        CHECK(!model[i].used || model[i].extent == extent);
        if (!model[i].used) {
            free_units += model[i].length;
            largest = model[i].length > largest ? model[i].length : largest;
            first_hole = first_hole == NONE ? extent : first_hole;
        }
        before = extent;
        extent = ndm_i_extents_next(extents, extent);
    }
    CHECK(extent == NONE && ndm_i_extents_last(extents) == before);
    CHECK(extents->mark == model_mark() && extents->free_units == free_units);
    CHECK(ndm_i_extents_largest(extents) == largest);
    CHECK(ndm_i_extents_first_hole(extents) == first_hole);
}

static void take(ndm_i_extents *extents, uint64_t length, uint32_t tag)
{
    if (count >= MOST - 1 || length > UINT64_MAX / 2 - model_mark())
        return;
    uint64_t best = UINT64_MAX;
    for (size_t i = 0; i < count; i++)
        if (!model[i].used && model[i].length >= length && model[i].length < best)
            best = model[i].length;
    const ndm_i_place place = ndm_i_extents_find(extents, length);
    size_t at = 0;
    while (at < count && model[at].offset != place.offset)
        at++;
    CHECK(ndm_i_extents_reserve(extents));
    const uint32_t extent = ndm_i_extents_take(extents, place, length, tag);
    const struct piece taken = {place.offset, length, extent, tag, true};
    if (best != UINT64_MAX) {
        CHECK(at < count && !model[at].used && model[at].length >= length);
        CHECK(place.near ? model[at].length / 2 <= best : model[at].length == best);
        const uint64_t found = model[at].length;
        model[at] = taken;
        if (found > length)
            model_insert(at + 1, (struct piece){place.offset + length, found - length, NONE, NONE, false});
    } else if (count > 0 && !model[count - 1].used) {
        CHECK(at == count - 1);
        model[at] = taken;
    } else {
        CHECK(place.hole == NONE && place.offset == model_mark());
        model_insert(count, taken);
    }
}

static void release(ndm_i_extents *extents, size_t at)
{
    if (at == count)
        return;
    ndm_i_extents_release(extents, model[at].extent);
    model[at].used = false;
    model_join(at);
    if (at > 0)
        model_join(at - 1);
}

/* Push a hole past its follower. */
static void slide(ndm_i_extents *extents, size_t at)
{
    if (at + 1 >= count)
        return;
    const uint32_t hole = ndm_i_extents_previous(extents, model[at + 1].extent);
    const uint32_t after = ndm_i_extents_slide(extents, hole);
    const struct piece moved = model[at + 1];
    model[at + 1].offset = model[at].offset + moved.length;
    model[at + 1].length = model[at].length;
    model[at + 1].used = false;
    model[at].length = moved.length;
    model[at].used = true;
    model[at].extent = moved.extent;
    model[at].tag = moved.tag;
    model_join(at + 1);
    CHECK(ndm_i_extents_offset(extents, after) == model[at + 1].offset);
}

static void trim(ndm_i_extents *extents)
{
    if (count > 0 && !model[count - 1].used)
        count--;
    CHECK(ndm_i_extents_trim(extents) == model_mark());
}

/* Take something and undo that. */
static void take_back(ndm_i_extents *extents, uint64_t length)
{
    const uint64_t mark = extents->mark;
    size_t at = 0;
    take(extents, length, PASSING);
    while (at < count && !(model[at].used && model[at].tag == PASSING))
        at++;
    if (at == count)
        return; /* too many extents */
    release(extents, at);
    ndm_i_extents_lower(extents, mark);
    if (model_mark() > mark && !(model[count - 1].length -= model_mark() - mark))
        count--;
}

static void set_tag(ndm_i_extents *extents, size_t at, uint32_t tag)
{
    if (at == count)
        return;
    ndm_i_extents_set_tag(extents, model[at].extent, tag);
    model[at].tag = tag;
}

/* A hole is to be used before others, or not any more; a walk stands there. */
static void prefer(ndm_i_extents *extents, size_t at, bool near)
{
    if (at == count)
        return;
    uint32_t hole = ndm_i_extents_first(extents);
    while (ndm_i_extents_offset(extents, hole) != model[at].offset)
        hole = ndm_i_extents_next(extents, hole);
    ndm_i_extents_prefer(extents, hole, near);
    extents->cursor = hole;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    ndm_i_extents extents;
    ndm_i_extents_init(&extents);
    count = 0;
    compare(&extents);
    /* Three bytes an operation: what, and a small number, scaled up by some powers of two. */
    for (; size >= 3; data += 3, size -= 3) {
        const uint64_t number = data[1] + ((uint64_t)(data[2] & 15) << 8);
        const uint64_t length = (number << (data[2] >> 4) * 2) + 1;
        switch (data[0] % 8) {
        case 0:
        case 1:
        case 2:
            take(&extents, length, (uint32_t)number);
            break;
        case 3:
        case 4:
            release(&extents, pick(true, number));
            break;
        case 5:
            slide(&extents, pick(false, number));
            break;
        case 6:
            if (number % 3)
                prefer(&extents, pick(false, number), number % 3 == 1);
            else
                set_tag(&extents, pick(true, number), (uint32_t)number * 77);
            break;
        default:
            if (number % 2)
                trim(&extents);
            else
                take_back(&extents, length);
        }
        compare(&extents);
    }
    ndm_i_extents_fini(&extents);
    return 0;
}
