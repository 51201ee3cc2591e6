/* Sums behind the MonoScore, latent after latent, from entries sorted by latent (see sort_by_latent). */
#include "common.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define HAS_HALF 1
#else
#define HAS_HALF 0
#endif

/* Whether mono_rows takes embeddings of float16. */
int takes_half(void) { return HAS_HALF; }

/* ---- a batch: each latent's score, and the score's derivative by each of its values --------------------------- */
/* w += sum of c[i] * row i over four rows of d numbers, and out[i] = <w, row i> */
static inline void add_four(float *w, const float *const *h, const float *c, i64 d) {
    const float *h0 = h[0], *h1 = h[1], *h2 = h[2], *h3 = h[3];
#pragma omp simd
    for (i64 j = 0; j < d; j++) w[j] += c[0] * h0[j] + c[1] * h1[j] + c[2] * h2[j] + c[3] * h3[j];
}

static inline void dot_four(const float *w, const float *const *h, float *out, i64 d) {
    const float *h0 = h[0], *h1 = h[1], *h2 = h[2], *h3 = h[3];
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (i64 j = 0; j < d; j++) {
        s0 += w[j] * h0[j];
        s1 += w[j] * h1[j];
        s2 += w[j] * h2[j];
        s3 += w[j] * h3[j];
    }
    out[0] = s0, out[1] = s1, out[2] = s2, out[3] = s3;
}

#if HAS_HALF
static inline __m512 wide(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

static inline __m512 wide_part(const uint16_t *p, __mmask16 m) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p));
}

static inline void add_four_half(float *w, const uint16_t *const *h, const float *c, i64 d) {
    const __m512 c0 = _mm512_set1_ps(c[0]), c1 = _mm512_set1_ps(c[1]);
    const __m512 c2 = _mm512_set1_ps(c[2]), c3 = _mm512_set1_ps(c[3]);
    i64 j = 0;
    for (; j + 16 <= d; j += 16) {
        __m512 even = _mm512_fmadd_ps(c0, wide(h[0] + j), _mm512_loadu_ps(w + j));
        __m512 odd = _mm512_mul_ps(c1, wide(h[1] + j));
        even = _mm512_fmadd_ps(c2, wide(h[2] + j), even);
        odd = _mm512_fmadd_ps(c3, wide(h[3] + j), odd);
        _mm512_storeu_ps(w + j, _mm512_add_ps(even, odd));
    }
    if (j < d) {
        const __mmask16 m = (__mmask16)((1u << (d - j)) - 1);
        __m512 s = _mm512_maskz_loadu_ps(m, w + j);
        s = _mm512_fmadd_ps(c0, wide_part(h[0] + j, m), s);
        s = _mm512_fmadd_ps(c1, wide_part(h[1] + j, m), s);
        s = _mm512_fmadd_ps(c2, wide_part(h[2] + j, m), s);
        s = _mm512_fmadd_ps(c3, wide_part(h[3] + j, m), s);
        _mm512_mask_storeu_ps(w + j, m, s);
    }
}

static inline void dot_four_half(const float *w, const uint16_t *const *h, float *out, i64 d) {
    __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
    i64 j = 0;
    for (; j + 16 <= d; j += 16) {
        const __m512 a = _mm512_loadu_ps(w + j);
        s0 = _mm512_fmadd_ps(a, wide(h[0] + j), s0);
        s1 = _mm512_fmadd_ps(a, wide(h[1] + j), s1);
        s2 = _mm512_fmadd_ps(a, wide(h[2] + j), s2);
        s3 = _mm512_fmadd_ps(a, wide(h[3] + j), s3);
    }
    if (j < d) {
        const __mmask16 m = (__mmask16)((1u << (d - j)) - 1);
        const __m512 a = _mm512_maskz_loadu_ps(m, w + j);
        s0 = _mm512_fmadd_ps(a, wide_part(h[0] + j, m), s0);
        s1 = _mm512_fmadd_ps(a, wide_part(h[1] + j, m), s1);
        s2 = _mm512_fmadd_ps(a, wide_part(h[2] + j, m), s2);
        s3 = _mm512_fmadd_ps(a, wide_part(h[3] + j, m), s3);
    }
    out[0] = _mm512_reduce_add_ps(s0), out[1] = _mm512_reduce_add_ps(s1);
    out[2] = _mm512_reduce_add_ps(s2), out[3] = _mm512_reduce_add_ps(s3);
}

static inline void add_one_half(float *w, const uint16_t *h, float c, i64 d) {
    const __m512 factor = _mm512_set1_ps(c);
    i64 j = 0;
    for (; j + 16 <= d; j += 16)
        _mm512_storeu_ps(w + j, _mm512_fmadd_ps(factor, wide(h + j), _mm512_loadu_ps(w + j)));
    if (j < d) {
        const __mmask16 m = (__mmask16)((1u << (d - j)) - 1);
        const __m512 s = _mm512_fmadd_ps(factor, wide_part(h + j, m), _mm512_maskz_loadu_ps(m, w + j));
        _mm512_mask_storeu_ps(w + j, m, s);
    }
}

static inline float dot_one_half(const float *w, const uint16_t *h, i64 d) {
    __m512 s = _mm512_setzero_ps();
    i64 j = 0;
    for (; j + 16 <= d; j += 16) s = _mm512_fmadd_ps(_mm512_loadu_ps(w + j), wide(h + j), s);
    if (j < d) {
        const __mmask16 m = (__mmask16)((1u << (d - j)) - 1);
        s = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(m, w + j), wide_part(h + j, m), s);
    }
    return _mm512_reduce_add_ps(s);
}
#endif

static inline void add_one(float *w, const float *h, float c, i64 d) {
#pragma omp simd
    for (i64 j = 0; j < d; j++) w[j] += c * h[j];
}

/* What is done with a latent's rows, four at a time and then one at a time; T is the rows' type. */
#define ADD_ROWS(T, four, one)                                                                                        \
    {                                                                                                                 \
        i64 t = begin;                                                                                                \
        for (; t + 4 <= end; t += 4) {                                                                                \
            const T *h[4];                                                                                            \
            float c[4];                                                                                               \
            for (i64 i = 0; i < 4; i++) {                                                                             \
                h[i] = (const T *)H + rows[t + i] * d;                                                                \
                c[i] = values[order[t + i]] * inverse[rows[t + i]];                                                   \
            }                                                                                                         \
            four(w, h, c, d);                                                                                         \
        }                                                                                                             \
        for (; t < end; t++) one(w, (const T *)H + rows[t] * d, values[order[t]] * inverse[rows[t]], d);              \
    }

#define DOT_ROWS(T, four, one)                                                                                        \
    {                                                                                                                 \
        i64 t = begin;                                                                                                \
        for (; t + 4 <= end; t += 4) {                                                                                \
            const T *h[4];                                                                                            \
            float dots[4];                                                                                            \
            for (i64 i = 0; i < 4; i++) h[i] = (const T *)H + rows[t + i] * d;                                        \
            four(w, h, dots, d);                                                                                      \
            for (i64 i = 0; i < 4; i++) grad[order[t + i]] = dots[i] * inverse[rows[t + i]];                          \
        }                                                                                                             \
        for (; t < end; t++) grad[order[t]] = one(w, (const T *)H + rows[t] * d, d) * inverse[rows[t]];               \
    }

/* values [nnz] >= 0, H [n_rows, d] of float32 (or float16 with ``half``), inverse [n_rows] of its rows' norms.
 * carried [n, d], carried_u and carried_v [n] are earlier batches' sums of a h, a and a², or null; this batch's are
 * added to them, and then every earlier activation fades by ``decay``.
 * scores [n] (0 where it has none), valid [n], grad [nnz]: of each latent's score by its values. */
void mono_rows(const i64 *starts, const i64 *order, const i64 *rows, const float *values, const void *H, int half,
               const float *inverse, float *carried, float *carried_u, float *carried_v, float decay, float nothing,
               float *scores, unsigned char *valid, float *grad, i64 d, i64 n) {
#pragma omp parallel if (starts[n] * d > FEW)
    {
        float *w = malloc(d * sizeof(float));
#pragma omp for schedule(dynamic, 64)
        for (i64 l = 0; l < n; l++) {
            const i64 begin = starts[l], end = starts[l + 1];
            float *row = carried ? carried + l * d : NULL;
            double u = carried ? carried_u[l] : 0, v = carried ? carried_v[l] : 0, q = 0;
            scores[l] = 0;
            valid[l] = 0;
            for (i64 t = begin; t < end; t++) {
                const double a = values[order[t]];
                u += a;
                v += a * a;
                grad[order[t]] = 0;
            }
            const double den = u * u - v;
            if (carried) {
                carried_u[l] = decay * u;
                carried_v[l] = decay * decay * v;
                memcpy(w, row, d * sizeof(float));
            } else {
                if (!(den > nothing * u * u)) continue;
                memset(w, 0, d * sizeof(float));
            }
#if HAS_HALF
            if (half) ADD_ROWS(uint16_t, add_four_half, add_one_half)
            else
#endif
                ADD_ROWS(float, add_four, add_one)
            if (carried)
                for (i64 j = 0; j < d; j++) row[j] = decay * w[j];
            if (begin == end || !(den > nothing * u * u)) continue;
            for (i64 j = 0; j < d; j += 256) {
                float part = 0;
                const i64 stop = j + 256 < d ? j + 256 : d;
#pragma omp simd reduction(+ : part)
                for (i64 i = j; i < stop; i++) part += w[i] * w[i];
                q += part;
            }
            const double score = (q - v) / den;
            scores[l] = score;
            valid[l] = 1;
#if HAS_HALF
            if (half) DOT_ROWS(uint16_t, dot_four_half, dot_one_half)
            else
#endif
                DOT_ROWS(float, dot_four, dot)
            for (i64 t = begin; t < end; t++) {
                const double a = values[order[t]];
                grad[order[t]] = 2 * (grad[order[t]] - a - score * (u - a)) / den;
            }
        }
        free(w);
    }
}

/* ---- all batches, in float64 ------------------------------------------------------------------------------------ */
/* Adds a batch's entries to each latent's sums: how many there are, of a, of a² and of a h (h the rows of H [n_rows, d]
 * times inverse), and keeps its least and two largest values (largest [2, n]). */
void add_activations(const i64 *starts, const i64 *order, const i64 *rows, const float *values, const float *H,
                     const double *inverse, i64 *listed, double *total, double *squares, double *least, double *largest,
                     double *weighted, i64 d, i64 n) {
#pragma omp parallel for schedule(dynamic, 64) if (starts[n] * d > FEW)
    for (i64 l = 0; l < n; l++) {
        const i64 begin = starts[l], end = starts[l + 1];
        double *restrict w = weighted + l * d;
        double u = 0, v = 0, low = least[l], first = largest[l], second = largest[n + l];
        for (i64 t = begin; t < end; t++) {
            const double a = values[order[t]];
            u += a;
            v += a * a;
            if (a < low) low = a;
            if (a > first) second = first, first = a;
            else if (a > second) second = a;
        }
        listed[l] += end - begin;
        total[l] += u;
        squares[l] += v;
        least[l] = low, largest[l] = first, largest[n + l] = second;
        for (i64 t = begin; t < end; t += 4) {
            const float *h[4];
            double c[4];
            for (i64 i = 0; i < 4; i++) {
                const i64 at = t + i < end ? t + i : t;
                h[i] = H + rows[at] * d;
                c[i] = t + i < end ? values[order[at]] * inverse[rows[at]] : 0;
            }
            const float *h0 = h[0], *h1 = h[1], *h2 = h[2], *h3 = h[3];
#pragma omp simd
            for (i64 j = 0; j < d; j++) w[j] += (c[0] * h0[j] + c[1] * h1[j]) + (c[2] * h2[j] + c[3] * h3[j]);
        }
    }
}

/* norms [n] of the rows of H [n, d], and sum [d] += each row divided by its norm. */
void unit_rows(const float *H, double *norms, double *sum, i64 d, i64 n) {
#pragma omp parallel for if (n * d > FEW)
    for (i64 i = 0; i < n; i++) {
        double s = 0;
#pragma omp simd reduction(+ : s)
        for (i64 j = 0; j < d; j++) s += (double)H[i * d + j] * H[i * d + j];
        norms[i] = sqrt(s);
    }
#pragma omp parallel for schedule(static) if (n * d > FEW)
    for (i64 part = 0; part < d; part += 64) {
        const i64 stop = part + 64 < d ? part + 64 : d;
        for (i64 i = 0; i < n; i++) {
            const double c = 1 / norms[i];
            const float *h = H + i * d;
#pragma omp simd
            for (i64 j = part; j < stop; j++) sum[j] += c * h[j];
        }
    }
}
