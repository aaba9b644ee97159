#include "store/copy.h"

#include <stdint.h>
#include <string.h>

/* Measured on a Zen 5 server core, us per MiB between warm buffers larger than the cache, memcpy / AVX-512 streaming /
 * AVX streaming: 64 KiB 46 / 40 / 40, 256 KiB 47 / 39 / 40, 1 MiB 59 / 43 / 43, 16 MiB 54 / 44 / 43. Between buffers
 * that fit the cache memcpy is three times faster, up to 256 KiB; so streaming is for larger copies only. It also
 * leaves the engine's own data in the cache. */
#define STREAM_FROM ((size_t)256 << 10)

#if defined(__x86_64__)
#include <immintrin.h>

enum { LINE = 64 };

__attribute__((target("avx512f"))) static void stream_avx512(uint8_t *to, const uint8_t *from, size_t lines)
{
    for (; lines >= 4; lines -= 4, to += 4 * LINE, from += 4 * LINE) {
        const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + LINE);
        const __m512i c = _mm512_loadu_si512(from + 2 * LINE), d = _mm512_loadu_si512(from + 3 * LINE);
        _mm512_stream_si512((void *)to, a);
        _mm512_stream_si512((void *)(to + LINE), b);
        _mm512_stream_si512((void *)(to + 2 * LINE), c);
        _mm512_stream_si512((void *)(to + 3 * LINE), d);
    }
    memcpy(to, from, lines * LINE);
}

__attribute__((target("avx"))) static void stream_avx(uint8_t *to, const uint8_t *from, size_t lines)
{
    for (; lines >= 2; lines -= 2, to += 2 * LINE, from += 2 * LINE) {
        const __m256i a = _mm256_loadu_si256((const void *)from);
        const __m256i b = _mm256_loadu_si256((const void *)(from + LINE / 2));
        const __m256i c = _mm256_loadu_si256((const void *)(from + LINE));
        const __m256i d = _mm256_loadu_si256((const void *)(from + LINE + LINE / 2));
        _mm256_stream_si256((void *)to, a);
        _mm256_stream_si256((void *)(to + LINE / 2), b);
        _mm256_stream_si256((void *)(to + LINE), c);
        _mm256_stream_si256((void *)(to + LINE + LINE / 2), d);
    }
    memcpy(to, from, lines * LINE);
}

void ndm_i_copy(void *target, const void *source, size_t size)
{
    uint8_t *to = target;
    const uint8_t *from = source;
    const int wide = __builtin_cpu_supports("avx512f");
    if (size < STREAM_FROM || (!wide && !__builtin_cpu_supports("avx"))) {
        memcpy(target, source, size);
        return;
    }
    const size_t head = -(uintptr_t)to % LINE, lines = (size - head) / LINE, tail = (size - head) % LINE;
    memcpy(to, from, head);
    if (wide)
        stream_avx512(to + head, from + head, lines);
    else
        stream_avx(to + head, from + head, lines);
    memcpy(to + size - tail, from + size - tail, tail);
    _mm_sfence(); /* streaming stores are visible to whoever sees the slot */
}

#else

void ndm_i_copy(void *target, const void *source, size_t size) { memcpy(target, source, size); }

#endif
