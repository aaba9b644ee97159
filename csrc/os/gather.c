/* See gather.h. */
#define _GNU_SOURCE
#include "os/gather.h"

#include <errno.h>

/* The longest piece that may be written at once, `left` bytes being left. To map and read what is in RAM takes, us a MiB:
 * of folios of 64 KiB 75, 512 KiB 42, 1 MiB 40, 2 MiB 34; and 34 where it was mapped before. */
static uint64_t piece_at(uint64_t offset, uint64_t left, bool wide)
{
    uint64_t piece = NDM_I_HUGE;
    while (piece > NDM_I_GRAIN && (!wide || offset % piece > 0 || left < piece))
        piece /= 2;
    return piece - offset % piece;
}

int ndm_i_file_gather(const ndm_i_file *file, struct iovec *parts, uint64_t count, uint64_t offset, bool wide)
{
    enum { AT_ONCE = 256 }; /* parts a call; the system takes 1024 */
    uint64_t left = 0;
    for (uint64_t i = 0; i < count; i++)
        left += parts[i].iov_len;
    while (count > 0) {
        const uint64_t most = piece_at(offset, left, wide);
        uint64_t taken = 0, total = 0;
        while (taken < count && taken < AT_ONCE && total < most)
            total += parts[taken++].iov_len;
        const uint64_t beyond = total > most ? total - most : 0; /* of the last part, left to the next call */
        parts[taken - 1].iov_len -= beyond;
        const ssize_t wrote = pwritev(file->fd, parts, (int)taken, (off_t)offset);
        const int refused = wrote < 0 ? errno : wrote == 0 && total > 0 ? EIO : 0;
        parts[taken - 1].iov_len += beyond;
        if (refused && refused != EINTR)
            return refused;
        uint64_t done = wrote > 0 ? (uint64_t)wrote : 0;
        offset += done;
        left -= done;
        for (; count > 0 && done >= parts->iov_len && (done > 0 || parts->iov_len == 0); parts++, count--)
            done -= parts->iov_len;
        if (done > 0) {
            parts->iov_base = (char *)parts->iov_base + done;
            parts->iov_len -= done;
        }
    }
    return 0;
}
