/* What the CPU kernels share. They are for float32; matrices are row-major, latents and offsets int64. Every function
 * shares its rows or latents among OpenMP's threads (PyTorch's own, see ../build.py); without OpenMP it is the same on
 * one thread.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t i64;

enum { FEW = 1 << 21 }; /* multiplications (about) that are done sooner by one thread than by waking the others */

#if defined(__GNUC__)
#define PREFETCH(p) __builtin_prefetch(p)
#else
#define PREFETCH(p)
#endif

static inline float dot(const float *a, const float *b, i64 d) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 j = 0; j < d; j++) sum += a[j] * b[j];
    return sum;
}

/* products.c: pre-activations of n listed latents of one row, values[c] = <x, W[latents[c]]> + bias */
void exact_row(const i64 *latents, i64 n, const float *x, const float *W, const float *bias, float *values, i64 d);
