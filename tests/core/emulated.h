/* What an emulator may lack, found out when the program runs. */
#ifndef EMULATED_H
#define EMULATED_H

#include <stdbool.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Can a shared mapping be doubled (mremap of 0 bytes)? Linux can. Valgrind and the user mode of qemu refuse, and then a
 * region cannot grow past the address space that it reserved, while a view lives. Says so, once. */
static inline bool can_double_mappings(void)
{
    static int known; /* 1: no, 2: yes */
    if (known == 0) {
        void *area = mmap(NULL, 4096, PROT_READ, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        const long twin = syscall(SYS_mremap, area, 0ul, 4096ul, 1ul /* MREMAP_MAYMOVE */, 0ul);
        known = twin == -1 ? 1 : 2;
        if (known == 1)
            fprintf(stderr, "skipped: growth past the reservation under a view (no mremap of 0 bytes here)\n");
        else
            munmap((void *)twin, 4096);
        munmap(area, 4096);
    }
    return known == 2;
}

#endif
