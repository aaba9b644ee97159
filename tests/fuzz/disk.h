/* The disk under a fuzzed region: which blocks each file has, how many are left, and which calls are to fail. */
#ifndef NDM_FUZZ_DISK_H
#define NDM_FUZZ_DISK_H

#include "region/ledger.h"

enum { DISK_BLOCK = 4096, DISK_BLOCKS = 8192, DISK_FILES = 64 };

enum {
    FAIL_PWRITE = 1,
    FAIL_ALLOCATE = 2,
    FAIL_PUNCH = 4, /* half of it done */
    FAIL_SIZE = 8,
    FAIL_STAT = 16,
    FAIL_MAP = 32,
    FAIL_MEMORY = 64,
};

extern struct disk {
    ndm_region *region;      /* stores into its mapping are checked */
    uint64_t free_blocks;
    uint64_t address_limit;  /* longest mapping that is granted */
    _Atomic int64_t mapped;  /* bytes mapped and not unmapped */
    int fail;                /* kinds of calls that fail ... */
    int fail_after;          /* ... once, after so many */
    int fail_errno;
    uint64_t fired[7];       /* how often a call of each kind has failed, in the order above */
    bool in_memory, moves_blocks, no_allocate, no_punch;
} disk;

/* A disk of plenty where nothing fails. */
void disk_reset(void);

/* Has each ready grain all its blocks? */
bool disk_is_sound(const ndm_region *region);

#endif
