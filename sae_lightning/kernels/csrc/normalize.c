/* Features of 16 bits, or float32, to float32 with a mean taken off and a deviation divided out, in one pass. */
#include "common.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

enum { F16, BF16, F32 };

static float from_half(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023, bits;
    if (exponent == 31) bits = sign | 0x7f800000 | mantissa << 13;
    else if (exponent) bits = sign | (exponent + 112) << 23 | mantissa << 13;
    else { /* subnormal: mantissa · 2^-24 */
        float f = (float)mantissa * 0x1p-24f;
        memcpy(&bits, &f, 4);
        bits |= sign;
    }
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static void half_row(const uint16_t *x, const float *mean, float std, float *out, i64 d) {
    i64 j = 0;
#if defined(__F16C__) && defined(__AVX__)
    __m256 divisor = _mm256_set1_ps(std);
    for (; j + 8 <= d; j += 8) {
        __m256 v = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + j)));
        _mm256_storeu_ps(out + j, _mm256_div_ps(_mm256_sub_ps(v, _mm256_loadu_ps(mean + j)), divisor));
    }
#endif
    for (; j < d; j++) out[j] = (from_half(x[j]) - mean[j]) / std;
}

static void bfloat_row(const uint16_t *x, const float *mean, float std, float *out, i64 d) {
#pragma omp simd
    for (i64 j = 0; j < d; j++) {
        uint32_t bits = (uint32_t)x[j] << 16;
        float f;
        memcpy(&f, &bits, 4);
        out[j] = (f - mean[j]) / std;
    }
}

static void float_row(const float *x, const float *mean, float std, float *out, i64 d) {
#pragma omp simd
    for (i64 j = 0; j < d; j++) out[j] = (x[j] - mean[j]) / std;
}

/* out = (x - mean) / std; x [n, d] of the given kind, mean [d] */
void normalize_rows(const void *x, i64 kind, const float *mean, float std, float *out, i64 d, i64 n) {
#pragma omp parallel for if (n * d > FEW)
    for (i64 i = 0; i < n; i++) {
        if (kind == F16) half_row((const uint16_t *)x + i * d, mean, std, out + i * d, d);
        else if (kind == BF16) bfloat_row((const uint16_t *)x + i * d, mean, std, out + i * d, d);
        else float_row((const float *)x + i * d, mean, std, out + i * d, d);
    }
}
