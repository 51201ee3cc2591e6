/* The choice of active latents among the entries of a product, and of their groups. */
#include "common.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define HAS_MASKS 1
#else
#define HAS_MASKS 0
#endif

/* ---- bfloat16 copies, with the norms of the rows and of what rounding took from them -------------------------- */
static inline uint16_t round_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float widen(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

void to_bf16(const float *W, uint16_t *out, float *norms, float *errors, i64 d, i64 n) {
#pragma omp parallel for schedule(static) if (n * d > FEW)
    for (i64 i = 0; i < n; i++) {
        const float *w = W + i * d;
        uint16_t *o = out + i * d;
        float square = 0, lost = 0;
#pragma omp simd reduction(+ : square, lost)
        for (i64 j = 0; j < d; j++) {
            o[j] = round_bf16(w[j]);
            const float error = w[j] - widen(o[j]);
            square += w[j] * w[j];
            lost += error * error;
        }
        norms[i] = sqrtf(square);
        errors[i] = sqrtf(lost);
    }
}

/* ---- selection ------------------------------------------------------------------------------------------------
 * A pre-activation known as value with an error of at most slack lies in [value - slack, value + slack]. slack of
 * entry (row, latent) is row_slack[row] * norms[latent] + relative * |value - bias|, of which |value| + |bias| is a
 * bound; all zero where values are exact.
 */
enum { BLOCK = 64, ROWS = 8 };

static inline void load_block(const void *row, int is_bf16, const float *bias, i64 at, i64 n, float *out) {
    if (is_bf16) {
        const uint16_t *p = (const uint16_t *)row + at;
        if (n == BLOCK)
#pragma omp simd
            for (i64 j = 0; j < BLOCK; j++) out[j] = widen(p[j]) + bias[at + j];
        else
            for (i64 j = 0; j < n; j++) out[j] = widen(p[j]) + bias[at + j];
    } else {
        const float *p = (const float *)row + at;
        if (n == BLOCK)
#pragma omp simd
            for (i64 j = 0; j < BLOCK; j++) out[j] = p[j] + bias[at + j];
        else
            for (i64 j = 0; j < n; j++) out[j] = p[j] + bias[at + j];
    }
}

/* Latents of one row with value >= cut, ascending; at most cap. */
static i64 scan(const void *row, int is_bf16, const float *bias, i64 d_sae, float cut, i64 *latents, float *values,
                i64 cap) {
    i64 found = 0;
    float block[BLOCK];
    for (i64 at = 0; at < d_sae; at += BLOCK) {
        const i64 n = d_sae - at < BLOCK ? d_sae - at : BLOCK;
        uint8_t hit[BLOCK] = {0};
        load_block(row, is_bf16, bias, at, n, block);
        if (n == BLOCK)
#pragma omp simd
            for (i64 j = 0; j < BLOCK; j++) hit[j] = block[j] >= cut;
        else
            for (i64 j = 0; j < n; j++) hit[j] = block[j] >= cut;
        for (i64 word = 0; word < BLOCK; word += 8) {
            uint64_t marks;
            memcpy(&marks, hit + word, 8);
            if (!marks) continue;
            for (i64 j = word; j < word + 8; j++)
                if (hit[j]) {
                    if (found == cap) return found;
                    latents[found] = at + j;
                    values[found++] = block[j];
                }
        }
    }
    return found;
}

/* Which of the n <= BLOCK latents from ``at`` on have value >= cuts[latent] - margin * norms[latent] (norms may be null), a
 * bit each. */
#if HAS_MASKS
static inline uint64_t hits(const void *row, int is_bf16, const float *bias, const float *cuts, float margin,
                            const float *norms, i64 at, i64 n) {
    uint64_t bits = 0;
    for (i64 j = 0; j < n; j += 16) {
        const __mmask16 m = n - j < 16 ? (__mmask16)((1u << (n - j)) - 1) : 0xffff;
        const i64 l = at + j;
        __m512 x;
        if (is_bf16) {
            const uint16_t *half = (const uint16_t *)row + l;
            const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, half));
            x = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
        } else x = _mm512_maskz_loadu_ps(m, (const float *)row + l);
        x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(m, bias + l));
        __m512 cut = _mm512_maskz_loadu_ps(m, cuts + l);
        if (norms) cut = _mm512_sub_ps(cut, _mm512_mul_ps(_mm512_set1_ps(margin), _mm512_maskz_loadu_ps(m, norms + l)));
        bits |= (uint64_t)_mm512_mask_cmp_ps_mask(m, x, cut, _CMP_GE_OQ) << j;
    }
    return bits;
}
#else
static inline uint64_t hits(const void *row, int is_bf16, const float *bias, const float *cuts, float margin,
                            const float *norms, i64 at, i64 n) {
    float block[BLOCK];
    uint8_t hit[BLOCK] = {0};
    uint64_t bits = 0;
    load_block(row, is_bf16, bias, at, n, block);
    if (norms)
        for (i64 j = 0; j < n; j++) hit[j] = block[j] >= cuts[at + j] - margin * norms[at + j];
    else
        for (i64 j = 0; j < n; j++) hit[j] = block[j] >= cuts[at + j];
    for (i64 j = 0; j < n; j++) bits |= (uint64_t)hit[j] << j;
    return bits;
}
#endif

/* Which latents have value >= cuts[latent] (lowered by row_slack[row] * norms[latent] where given): bit latent % BLOCK of
 * marks [n_rows, blocks]; counts [n_rows] tells how many. A few rows are looked at together, for what is of latents alone
 * to be read once. */
void mark_above(const void *pre, int is_bf16, const float *bias, i64 d_sae, const float *cuts, const float *row_slack,
                const float *norms, uint64_t *marks, i64 *counts, i64 n_rows) {
    const i64 width = is_bf16 ? 2 : 4, blocks = (d_sae + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(dynamic, 2) if (n_rows * d_sae > FEW)
    for (i64 first = 0; first < n_rows; first += ROWS) {
        const i64 stop = first + ROWS < n_rows ? first + ROWS : n_rows;
        for (i64 i = first; i < stop; i++) counts[i] = 0;
        for (i64 at = 0; at < d_sae; at += BLOCK) {
            const i64 n = d_sae - at < BLOCK ? d_sae - at : BLOCK;
            for (i64 i = first; i < stop; i++) {
                const char *row = (const char *)pre + i * d_sae * width;
                const uint64_t bits = hits(row, is_bf16, bias, cuts, row_slack ? row_slack[i] : 0, norms, at, n);
                marks[i * blocks + at / BLOCK] = bits;
                counts[i] += __builtin_popcountll(bits);
            }
        }
    }
}

/* The entries that mark_above marked, written at offsets[row]. */
void fill_above(const void *pre, int is_bf16, const float *bias, i64 d_sae, const uint64_t *marks, const i64 *offsets,
                i64 *latents, float *values, i64 n_rows) {
    const i64 blocks = (d_sae + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(dynamic, 16) if (n_rows * blocks > FEW / 64)
    for (i64 i = 0; i < n_rows; i++) {
        i64 e = offsets[i];
        for (i64 b = 0; b < blocks; b++)
            for (uint64_t left = marks[i * blocks + b]; left; left &= left - 1) {
                const i64 l = b * BLOCK + __builtin_ctzll(left), at = i * d_sae + l;
                latents[e] = l;
                values[e++] = (is_bf16 ? widen(((const uint16_t *)pre)[at]) : ((const float *)pre)[at]) + bias[l];
            }
    }
}

/* The k-th largest of n values, which are reordered (quickselect). */
static float kth_largest(float *a, i64 n, i64 k) {
    i64 lo = 0, hi = n - 1;
    k--;
    while (lo < hi) {
        const float x = a[lo], y = a[lo + (hi - lo) / 2], z = a[hi];
        const float pivot = x > y ? (y > z ? y : (x > z ? z : x)) : (x > z ? x : (y > z ? z : y));
        i64 i = lo, j = hi;
        while (i <= j) {
            while (a[i] > pivot) i++;
            while (a[j] < pivot) j--;
            if (i <= j) {
                const float swap = a[i];
                a[i++] = a[j];
                a[j--] = swap;
            }
        }
        if (k <= j) hi = j;
        else if (k >= i) lo = i;
        else return a[k];
    }
    return a[k];
}

void select_kth(float *values, i64 n, i64 k, float *out) { *out = kth_largest(values, n, k); }

static inline float error_of(float value, i64 latent, const float *bias, const float *norms, float slack,
                             float relative) {
    return slack * norms[latent] + 1.02f * relative * (fabsf(value) + fabsf(bias[latent]));
}

/* The k largest positive entries of each row, ascending by latent; of equal ones those of lower latents first.
 * latents and values are [rows, k], counts [rows] says how many there are. With slack, candidates that could
 * belong to the k largest get their exact value <x[row], W[latent]> + bias first. */
void topk_rows(const void *pre, int is_bf16, const float *bias, i64 d_sae, i64 k, const float *row_slack,
               float relative, const float *norms, float widest, const float *x, const float *W, i64 d, i64 *latents,
               float *values, i64 *counts, i64 n_rows) {
    const i64 width = is_bf16 ? 2 : 4;
    float tallest = 0;
    for (i64 l = 0; l < d_sae; l++) tallest = fabsf(bias[l]) > tallest ? fabsf(bias[l]) : tallest;
#pragma omp parallel if (n_rows * d_sae > FEW)
    {
    i64 *found = malloc(d_sae * sizeof(i64));
    float *near = malloc(d_sae * sizeof(float)), *scratch = malloc(d_sae * sizeof(float));
    float guess = INFINITY;
#pragma omp for schedule(static)
    for (i64 i = 0; i < n_rows; i++) {
        const char *row = (const char *)pre + i * d_sae * width;
        const float slack = row_slack ? row_slack[i] : 0;
        const float bottom = row_slack ? -slack * widest - 1.02f * relative * tallest : 0; /* below it no entry can be positive */
        i64 n = 0;
        float lowest = 0, cut = guess;
        if (cut == INFINITY) { /* first row: start from its largest value */
            float most = bottom, block[BLOCK];
            for (i64 at = 0; at < d_sae; at += BLOCK) {
                const i64 m = d_sae - at < BLOCK ? d_sae - at : BLOCK;
                load_block(row, is_bf16, bias, at, m, block);
                for (i64 j = 0; j < m; j++) most = block[j] > most ? block[j] : most;
            }
            cut = 0.7f * most;
        }
        for (int tries = 0;; tries++) { /* a value that is not finite would never be bracketed */
            const int last = !(cut > bottom) || tries == 100;
            if (last) cut = bottom;
            n = scan(row, is_bf16, bias, d_sae, cut, found, near, d_sae);
            lowest = 0;
            if (n >= k) { /* at least k entries have exact values of lowest or more */
                for (i64 c = 0; c < n; c++)
                    scratch[c] = near[c] - (row_slack ? error_of(near[c], found[c], bias, norms, slack, relative) : 0);
                lowest = kth_largest(scratch, n, k);
                if (lowest < 0) lowest = 0;
            }
            if (last) break;
            const float need = row_slack ? lowest - slack * widest - 1.02f * relative * (lowest + tallest) : lowest;
            if (n >= k && cut <= need) break;
            cut = n >= k ? need : (cut > 0 ? 0.8f * cut - 1e-6f : bottom);
        }
        guess = cut * (n > 3 * k ? 1.05f : 0.98f);
        i64 kept = 0;
        if (row_slack) {
            for (i64 c = 0; c < n; c++) {
                if (near[c] + error_of(near[c], found[c], bias, norms, slack, relative) >= lowest) found[kept++] = found[c];
            }
            exact_row(found, kept, x + i * d, W, bias, near, d);
        } else kept = n;
        float least = 0;
        i64 ties = k;
        if (kept > k) {
            memcpy(scratch, near, kept * sizeof(float));
            least = kth_largest(scratch, kept, k);
            for (i64 c = 0; c < kept; c++) ties -= near[c] > least;
        }
        i64 *out_latents = latents + i * k, out = 0;
        float *out_values = values + i * k;
        for (i64 c = 0; c < kept && out < k; c++) {
            if (!(near[c] > 0) || near[c] < least) continue;
            if (kept > k && near[c] == least && ties-- <= 0) continue;
            out_latents[out] = found[c];
            out_values[out++] = near[c];
        }
        counts[i] = out;
    }
    free(found);
    free(near);
    free(scratch);
    }
}

/* ---- groups by rank ------------------------------------------------------------------------------------------ */
enum { BUCKETS = 512, FINE = 18 }; /* of values by their logarithm, 32 to a factor of two, from the row's largest */

static int ascending(const void *a, const void *b) {
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static void sort_keys(uint64_t *keys, i64 n) {
    if (n > 32) {
        qsort(keys, n, sizeof(uint64_t), ascending);
        return;
    }
    for (i64 i = 1; i < n; i++) {
        const uint64_t key = keys[i];
        i64 j = i;
        for (; j > 0 && keys[j - 1] > key; j--) keys[j] = keys[j - 1];
        keys[j] = key;
    }
}

/* Group g of a row is its ks[g] largest positive values without its ks[g - 1] largest, of equal ones the first; the
 * last group has the rest. Row i is values[offsets[i]:offsets[i + 1]], or the i-th of width ``width`` without offsets.
 * Either ``group`` [nnz] is filled (the last for values that are not positive), or ``latents`` and ``kept``: places and
 * values by group, from starts[i * h + g] on, for all groups but ``left_out``.
 */
void rank_groups(const float *values, const i64 *offsets, i64 width, const i64 *ks, i64 h, i64 left_out,
                 const i64 *starts, i64 *group, i64 *latents, float *kept, i64 n_rows) {
    i64 longest = width;
    for (i64 i = 0; offsets && i < n_rows; i++)
        if (offsets[i + 1] - offsets[i] > longest) longest = offsets[i + 1] - offsets[i];
#pragma omp parallel if (n_rows * longest > FEW / 64)
    {
        uint64_t *found = malloc((2 * longest + 1) * sizeof(uint64_t)), *sorted = found + longest;
        i64 *end = malloc(BUCKETS * sizeof(i64));
#pragma omp for schedule(dynamic, 16)
        for (i64 i = 0; i < n_rows; i++) {
            const i64 first = offsets ? offsets[i] : i * width, m = offsets ? offsets[i + 1] - first : width;
            const float *row = values + first;
            i64 n = 0, done = 0;
            float most = 0;
            uint32_t bits;
            for (i64 j = 0; j < m; j++) most = row[j] > most ? row[j] : most;
            memcpy(&bits, &most, sizeof bits);
            const uint64_t least = UINT32_MAX - bits;
            for (i64 j = 0; j < m; j++) { /* the key of a larger value is smaller, of equal ones that of the first */
                memcpy(&bits, row + j, sizeof bits);
                found[n] = (uint64_t)(UINT32_MAX - bits) << 32 | (uint64_t)j;
                n += row[j] > 0;
                if (group) group[first + j] = h - 1;
            }
            memset(end, 0, BUCKETS * sizeof(i64));
#define BUCKET(key) ((((key) >> 32) - least) >> FINE < BUCKETS ? (((key) >> 32) - least) >> FINE : BUCKETS - 1)
            for (i64 e = 0; e < n; e++) end[BUCKET(found[e])]++;
            for (i64 b = 0, sum = 0; b < BUCKETS; b++) {
                sum += end[b];
                end[b] = sum - end[b];
            }
            for (i64 e = 0; e < n; e++) sorted[end[BUCKET(found[e])]++] = found[e];
            i64 b = 0;
            for (i64 g = 0; g + 1 < h && ks[g] < n; g++) { /* only where a group ends does the order matter */
                while (end[b] <= ks[g] - 1) b++;
                const i64 start = b ? end[b - 1] : 0;
                if (end[b] > ks[g] && (g == 0 || ks[g - 1] <= start)) sort_keys(sorted + start, end[b] - start);
            }
            for (i64 g = 0; g < h; g++) {
                const i64 last = g == h - 1 || ks[g] > n ? n : ks[g];
                i64 to = starts ? starts[i * h + g] : 0;
                for (; done < last; done++) {
                    const i64 at = (i64)(sorted[done] & UINT32_MAX);
                    if (group) group[first + at] = g;
                    else if (g != left_out) {
                        latents[to] = at;
                        kept[to++] = row[at];
                    }
                }
            }
        }
        free(found);
        free(end);
    }
}
