/* Address space by itself, where the system refuses: what was given back may be another thread's by then, and is left alone;
 * what could not be given back is tried again. The linker leads the core's system calls here (build.mk). */
#define _GNU_SOURCE
#include "check.h"
#include "os/mapping.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { LENGTH = 2 << 20, PAGE = 4096 };

static int unmapped, refused_unmap = -1; /* calls so far, and the one that is refused */
static void *refused_place;
static char *stranger; /* a page of another thread's, where something was unmapped */

void *__real_mmap(void *place, size_t length, int rights, int flags, int fd, off_t offset);

static void take(void *place)
{
    stranger = __real_mmap(place, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    CHECK(stranger == place);
    strcpy(stranger, "mine");
}

static void stranger_is_whole(void)
{
    unsigned char in_core;
    CHECK(stranger && mincore(stranger, PAGE, &in_core) == 0 && strcmp(stranger, "mine") == 0);
    CHECK(munmap(stranger, PAGE) == 0);
    stranger = NULL;
}

int __real_munmap(void *place, size_t length);
int __wrap_munmap(void *place, size_t length);

int __wrap_munmap(void *place, size_t length)
{
    if (unmapped++ == refused_unmap) {
        refused_place = place;
        errno = ENOMEM;
        return -1;
    }
    const int result = __real_munmap(place, length);
    if (unmapped == refused_unmap && result == 0) /* the head of a reservation */
        take(place);
    return result;
}

/* As kernels do that look at the target last: it is unmapped, and then the call fails. */
static bool refused_remap;
void *__real_mremap(void *old, size_t length, size_t wanted, int flags, void *place);
void *__wrap_mremap(void *old, size_t length, size_t wanted, int flags, void *place);

void *__wrap_mremap(void *old, size_t length, size_t wanted, int flags, void *place)
{
    if (!refused_remap)
        return __real_mremap(old, length, wanted, flags, place);
    refused_remap = false;
    if (flags & MREMAP_FIXED) {
        CHECK(__real_munmap(place, wanted) == 0);
        take(place);
    }
    errno = ENOMEM;
    return MAP_FAILED;
}

static bool crooked; /* reservations begin anywhere, as they do in older kernels */
static void *refused_file_map; /* the target of a mapping of the file that was refused */
static bool refuses_map;
void *__wrap_mmap(void *place, size_t length, int rights, int flags, int fd, off_t offset);

void *__wrap_mmap(void *place, size_t length, int rights, int flags, int fd, off_t offset)
{
    if (crooked && fd < 0) {
        char *area = __real_mmap(NULL, length + 2 * LENGTH, rights, flags, fd, offset);
        const size_t before = LENGTH - (uintptr_t)area % LENGTH + PAGE;
        CHECK(area != MAP_FAILED && __real_munmap(area, before) == 0);
        CHECK(__real_munmap(area + before + length, 2 * LENGTH - before) == 0);
        return area + before;
    }
    if (!refuses_map || fd < 0)
        return __real_mmap(place, length, rights, flags, fd, offset);
    refuses_map = false;
    if (place && flags & MAP_FIXED) {
        CHECK(__real_munmap(place, length) == 0);
        take(place);
        refused_file_map = place;
    }
    errno = ENOMEM;
    return MAP_FAILED;
}

/* A reservation that cannot be cut at its end: its head is another's by then. */
static void test_cutting(int fd)
{
    unmapped = 0;
    refused_unmap = 1;
    crooked = true;
    ndm_i_mapping *mapping = ndm_i_mapping_new(fd, LENGTH);
    crooked = false;
    refused_unmap = -1;
    CHECK(mapping && refused_place); /* it does without the reservation */
    ndm_i_mapping_unref(mapping);
    stranger_is_whole();
}

static void test_targets(int fd)
{
    ndm_i_mapping *mapping = ndm_i_mapping_new(fd, LENGTH);
    CHECK(mapping);
    refused_remap = true;
    CHECK(ndm_i_mapping_extend(&mapping, 4 * LENGTH) == NDM_ERR_IO && ndm_last_error()->os_errno == ENOMEM);
    stranger_is_whole();
    CHECK(mapping->length == LENGTH && ndm_i_mapping_extend(&mapping, 4 * LENGTH) == NDM_OK);
    ndm_i_mapping_unref(mapping);
    refuses_map = true;
    CHECK(!ndm_i_mapping_new(fd, LENGTH) && ndm_last_error()->os_errno == ENOMEM && refused_file_map);
    stranger_is_whole();
}

/* What could not be unmapped goes before something is mapped. */
static void test_again(int fd)
{
    ndm_i_mapping *kept = ndm_i_mapping_new_to_read(fd, LENGTH);
    unsigned char in_core[LENGTH / PAGE];
    CHECK(kept);
    void *base = kept->base;
    unmapped = 0;
    refused_unmap = 0;
    ndm_i_mapping_unref(kept);
    refused_unmap = -1;
    CHECK(refused_place == base && mincore(base, LENGTH, in_core) == 0);
    ndm_i_mapping *other = ndm_i_mapping_new_to_read(fd, LENGTH);
    CHECK(other && (other->base == base || mincore(base, LENGTH, in_core) != 0));
    ndm_i_mapping_unref(other);
}

int main(void)
{
    const int fd = memfd_create("test_mapping", 0);
    CHECK(fd >= 0 && ftruncate(fd, 8 * LENGTH) == 0);
    test_cutting(fd);
    test_targets(fd);
    test_again(fd);
    printf("mapping: cut, targets, again: ok\n");
    return 0;
}
