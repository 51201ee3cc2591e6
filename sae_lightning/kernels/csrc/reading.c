/* Rows of a file scattered into memory: each byte is copied from the page cache into a small stage, and from there, past
 * the processor's caches, to its place. Several threads of the caller may read at once; nothing here starts a thread.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <unistd.h>

#include "common.h"

#if defined(__SSE2__)
#include <immintrin.h>

/* both aligned to 16 bytes, n a multiple of 16; the row will be read much later, so it need not stay in a cache */
static void stream_row(char *to, const char *from, i64 n) {
    for (i64 i = 0; i < n; i += 16)
        _mm_stream_si128((__m128i *)(to + i), _mm_loadu_si128((const __m128i *)(from + i)));
}
#define FENCE() _mm_sfence()
#else
#define stream_row memcpy
#define FENCE()
#endif

/* Read n rows of row_bytes from fd at offset; row i goes to out + places[i] * row_bytes. stage holds stage_rows rows.
 * Returns the number of whole rows that were there (fewer than n where the file ends), or -errno. */
i64 read_rows(i64 fd, i64 offset, i64 row_bytes, const i64 *places, i64 n, char *out, char *stage, i64 stage_rows) {
    int streamable = row_bytes % 16 == 0 && (uintptr_t)out % 16 == 0;
    i64 done = 0, held = 0; /* rows in place, bytes at the stage's start that belong to the next rows */
    while (done < n) {
        i64 wanted = (n - done < stage_rows ? n - done : stage_rows) * row_bytes;
        ssize_t got = pread((int)fd, stage + held, (size_t)(wanted - held), offset + done * row_bytes + held);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return -errno;
        if (got == 0) break;
        held += got;
        i64 rows = held / row_bytes;
        for (i64 i = 0; i < rows; i++) {
            char *to = out + places[done + i] * row_bytes;
            if (streamable) stream_row(to, stage + i * row_bytes, row_bytes);
            else memcpy(to, stage + i * row_bytes, (size_t)row_bytes);
        }
        done += rows;
        held -= rows * row_bytes;
        memmove(stage, stage + rows * row_bytes, (size_t)held);
    }
    FENCE();
    return done;
}
