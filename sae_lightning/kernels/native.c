/* Sparse products, selection and Adam on the CPU, for float32.
 *
 * Every function shares its rows or latents among OpenMP's threads (PyTorch's own, see build.py); without OpenMP it
 * is the same on one thread. Matrices are row-major. latents and offsets are int64.
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

/* ---- decode: out[i] = bias + sum of values[e] * W[latents[e]] over row i's entries --------------------------- */
void decode_rows(const i64 *latents, const float *values, const i64 *offsets, const float *W, const float *bias,
                 float *out, i64 d, i64 n) {
    const i64 last = offsets[n];
#pragma omp parallel for schedule(dynamic, 32) if (offsets[n] * d > FEW)
    for (i64 i = 0; i < n; i++) {
        float *o = out + i * d;
        if (bias) memcpy(o, bias, d * sizeof(float));
        else memset(o, 0, d * sizeof(float));
        i64 e = offsets[i];
        for (; e + 4 <= offsets[i + 1]; e += 4) {
            const float v0 = values[e], v1 = values[e + 1], v2 = values[e + 2], v3 = values[e + 3];
            const float *w0 = W + latents[e] * d, *w1 = W + latents[e + 1] * d;
            const float *w2 = W + latents[e + 2] * d, *w3 = W + latents[e + 3] * d;
            for (i64 t = e + 4; t < e + 8 && t < last; t++) {
                const float *next = W + latents[t] * d;
                PREFETCH(next);
                PREFETCH(next + 16);
                PREFETCH(next + 32);
                PREFETCH(next + 48);
            }
#pragma omp simd
            for (i64 j = 0; j < d; j++) o[j] += v0 * w0[j] + v1 * w1[j] + v2 * w2[j] + v3 * w3[j];
        }
        for (; e < offsets[i + 1]; e++) {
            const float v = values[e];
            const float *w = W + latents[e] * d;
#pragma omp simd
            for (i64 j = 0; j < d; j++) o[j] += v * w[j];
        }
    }
}

/* ---- exact pre-activations of n listed latents of one row: values[c] = <x, W[latents[c]]> + bias --------------- */
static void exact_row(const i64 *latents, i64 n, const float *x, const float *W, const float *bias, float *values,
                      i64 d) {
    i64 c = 0;
    for (; c + 4 <= n; c += 4) {
        const float *w0 = W + latents[c] * d, *w1 = W + latents[c + 1] * d;
        const float *w2 = W + latents[c + 2] * d, *w3 = W + latents[c + 3] * d;
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        for (i64 t = c + 4; t < c + 8 && t < n; t++)
            for (i64 j = 0; j < d && j < 64; j += 16) PREFETCH(W + latents[t] * d + j);
#pragma omp simd reduction(+ : s0, s1, s2, s3)
        for (i64 j = 0; j < d; j++) {
            s0 += x[j] * w0[j];
            s1 += x[j] * w1[j];
            s2 += x[j] * w2[j];
            s3 += x[j] * w3[j];
        }
        values[c] = s0 + bias[latents[c]];
        values[c + 1] = s1 + bias[latents[c + 1]];
        values[c + 2] = s2 + bias[latents[c + 2]];
        values[c + 3] = s3 + bias[latents[c + 3]];
    }
    for (; c < n; c++) values[c] = dot(x, W + latents[c] * d, d) + bias[latents[c]];
}

void exact_rows(const i64 *latents, const i64 *offsets, const float *x, const float *W, const float *bias,
                float *values, i64 d, i64 n) {
#pragma omp parallel for schedule(dynamic, 32) if (offsets[n] * d > FEW)
    for (i64 i = 0; i < n; i++)
        exact_row(latents + offsets[i], offsets[i + 1] - offsets[i], x + i * d, W, bias, values + offsets[i], d);
}

/* ---- entries by latent: a counting sort; starts has d_sae + 1 places ------------------------------------------ */
void sort_by_latent(const i64 *latents, const i64 *offsets, i64 n_rows, i64 d_sae, i64 *starts, i64 *order,
                    i64 *rows) {
    memset(starts, 0, (d_sae + 1) * sizeof(i64));
    const i64 nnz = offsets[n_rows];
    for (i64 e = 0; e < nnz; e++) starts[latents[e] + 1]++;
    for (i64 l = 0; l < d_sae; l++) starts[l + 1] += starts[l];
    i64 *next = malloc(d_sae * sizeof(i64));
    memcpy(next, starts, d_sae * sizeof(i64));
    for (i64 i = 0; i < n_rows; i++)
        for (i64 e = offsets[i]; e < offsets[i + 1]; e++) {
            const i64 t = next[latents[e]]++;
            order[t] = e;
            rows[t] = i;
        }
    free(next);
}

/* ---- backward of decode, one latent after another: its row's gradient and the values' gradient at once -------- */
void decode_backward(const i64 *starts, const i64 *order, const i64 *rows, const float *values, const float *W,
                     const float *G, float *grad_W, float *grad_values, i64 d, i64 n) {
#pragma omp parallel for schedule(dynamic, 64) if (starts[n] * d > FEW)
    for (i64 l = 0; l < n; l++) {
        const float *w = W + l * d;
        float *restrict gw = grad_W + l * d;
        i64 t = starts[l];
        memset(gw, 0, d * sizeof(float));
        for (; t + 4 <= starts[l + 1]; t += 4) {
            const i64 *e = order + t;
            const float v0 = values[e[0]], v1 = values[e[1]], v2 = values[e[2]], v3 = values[e[3]];
            const float *g0 = G + rows[t] * d, *g1 = G + rows[t + 1] * d;
            const float *g2 = G + rows[t + 2] * d, *g3 = G + rows[t + 3] * d;
            float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
            for (i64 j = 0; j < d; j++) {
                gw[j] += v0 * g0[j] + v1 * g1[j] + v2 * g2[j] + v3 * g3[j];
                s0 += g0[j] * w[j];
                s1 += g1[j] * w[j];
                s2 += g2[j] * w[j];
                s3 += g3[j] * w[j];
            }
            grad_values[e[0]] = s0;
            grad_values[e[1]] = s1;
            grad_values[e[2]] = s2;
            grad_values[e[3]] = s3;
        }
        for (; t < starts[l + 1]; t++) {
            const float v = values[order[t]];
            const float *g = G + rows[t] * d;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (i64 j = 0; j < d; j++) {
                gw[j] += v * g[j];
                sum += g[j] * w[j];
            }
            grad_values[order[t]] = sum;
        }
    }
}

/* ---- out[l] = sum of values[e] * X[row] over latent l's entries, total[l] = sum of values[e] ------------------ */
void scatter_rows(const i64 *starts, const i64 *order, const i64 *rows, const float *values, const float *X,
                  float *out, float *total, i64 d, i64 n) {
#pragma omp parallel for schedule(dynamic, 64) if (starts[n] * d > FEW)
    for (i64 l = 0; l < n; l++) {
        float *restrict o = out + l * d, sum = 0;
        i64 t = starts[l];
        memset(o, 0, d * sizeof(float));
        for (; t + 4 <= starts[l + 1]; t += 4) {
            const i64 *e = order + t;
            const float v0 = values[e[0]], v1 = values[e[1]], v2 = values[e[2]], v3 = values[e[3]];
            const float *x0 = X + rows[t] * d, *x1 = X + rows[t + 1] * d;
            const float *x2 = X + rows[t + 2] * d, *x3 = X + rows[t + 3] * d;
#pragma omp simd
            for (i64 j = 0; j < d; j++) o[j] += v0 * x0[j] + v1 * x1[j] + v2 * x2[j] + v3 * x3[j];
            sum += (v0 + v1) + (v2 + v3);
        }
        for (; t < starts[l + 1]; t++) {
            const float v = values[order[t]];
            const float *x = X + rows[t] * d;
#pragma omp simd
            for (i64 j = 0; j < d; j++) o[j] += v * x[j];
            sum += v;
        }
        total[l] = sum;
    }
}

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
enum { BLOCK = 64 };

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

/* Latents of one row with value >= cut (or >= cuts[latent] - margin * norms[latent] where cuts is given), ascending;
 * at most cap. */
static i64 scan(const void *row, int is_bf16, const float *bias, i64 d_sae, float cut, const float *cuts,
                float margin, const float *norms, i64 *latents, float *values, i64 cap) {
    i64 found = 0;
    float block[BLOCK];
    for (i64 at = 0; at < d_sae; at += BLOCK) {
        const i64 n = d_sae - at < BLOCK ? d_sae - at : BLOCK;
        uint8_t hit[BLOCK] = {0};
        load_block(row, is_bf16, bias, at, n, block);
        if (norms && cuts) {
            if (n == BLOCK)
#pragma omp simd
                for (i64 j = 0; j < BLOCK; j++) hit[j] = block[j] >= cuts[at + j] - margin * norms[at + j];
            else
                for (i64 j = 0; j < n; j++) hit[j] = block[j] >= cuts[at + j] - margin * norms[at + j];
        } else if (cuts) {
            if (n == BLOCK)
#pragma omp simd
                for (i64 j = 0; j < BLOCK; j++) hit[j] = block[j] >= cuts[at + j];
            else
                for (i64 j = 0; j < n; j++) hit[j] = block[j] >= cuts[at + j];
        } else {
            if (n == BLOCK)
#pragma omp simd
                for (i64 j = 0; j < BLOCK; j++) hit[j] = block[j] >= cut;
            else
                for (i64 j = 0; j < n; j++) hit[j] = block[j] >= cut;
        }
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

/* How many entries scan finds in each row; counts has one place a row. */
void count_above(const void *pre, int is_bf16, const float *bias, i64 d_sae, const float *cuts,
                 const float *row_slack, const float *norms, i64 *counts, i64 n_rows) {
    const i64 width = is_bf16 ? 2 : 4;
#pragma omp parallel for schedule(dynamic, 16) if (n_rows * d_sae > FEW)
    for (i64 i = 0; i < n_rows; i++) {
        const char *row = (const char *)pre + i * d_sae * width;
        const float margin = row_slack ? row_slack[i] : 0;
        i64 found = 0;
        float block[BLOCK];
        for (i64 at = 0; at < d_sae; at += BLOCK) {
            const i64 n = d_sae - at < BLOCK ? d_sae - at : BLOCK;
            int hits = 0;
            load_block(row, is_bf16, bias, at, n, block);
            if (norms)
#pragma omp simd reduction(+ : hits)
                for (i64 j = 0; j < n; j++) hits += block[j] >= cuts[at + j] - margin * norms[at + j];
            else
#pragma omp simd reduction(+ : hits)
                for (i64 j = 0; j < n; j++) hits += block[j] >= cuts[at + j];
            found += hits;
        }
        counts[i] = found;
    }
}

/* The entries that count_above counted, written at offsets[row]. */
void fill_above(const void *pre, int is_bf16, const float *bias, i64 d_sae, const float *cuts,
                const float *row_slack, const float *norms, const i64 *offsets, i64 *latents, float *values,
                i64 n_rows) {
    const i64 width = is_bf16 ? 2 : 4;
#pragma omp parallel for schedule(dynamic, 16) if (n_rows * d_sae > FEW)
    for (i64 i = 0; i < n_rows; i++)
        scan((const char *)pre + i * d_sae * width, is_bf16, bias, d_sae, 0, cuts,
             row_slack ? row_slack[i] : 0, norms, latents + offsets[i], values + offsets[i],
             offsets[i + 1] - offsets[i]);
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
            n = scan(row, is_bf16, bias, d_sae, cut, NULL, 0, norms, found, near, d_sae);
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

/* ---- Adam ----------------------------------------------------------------------------------------------------- */
/* Sum of |g|^2, without each row's part along p where p is given (the part that the unit norm undoes). */
void squared_norm(const float *g, const float *p, i64 d, double *out, i64 n) {
    double sum = 0;
#pragma omp parallel for schedule(static) reduction(+ : sum) if (n * d > FEW)
    for (i64 i = 0; i < n; i++) {
        double square = dot(g + i * d, g + i * d, d);
        if (p) {
            const double along = dot(g + i * d, p + i * d, d);
            const double length = dot(p + i * d, p + i * d, d);
            square -= length > 0 ? along * along * (2 - length) : 0;
        }
        sum += square > 0 ? square : 0;
    }
    *out = sum;
}

/* One Adam step on rows of p; with unit, the gradient's part along the row is removed first and the row is scaled
 * to unit norm afterwards. step_size = lr / (1 - beta1^t), root = sqrt(1 - beta2^t). */
void adam_rows(float *p, const float *g, float *m, float *v, i64 d, float scale, float step_size, float root,
               float beta1, float beta2, float eps, float shrink, float decay, int unit, i64 n) {
    const float inverse = 1 / root;
#pragma omp parallel for schedule(static) if (n * d > FEW)
    for (i64 i = 0; i < n; i++) {
        float *pi = p + i * d, *mi = m + i * d, *vi = v + i * d;
        const float *gi = g + i * d;
        const float along = unit ? dot(gi, pi, d) : 0;
        float square = 0;
#pragma omp simd reduction(+ : square)
        for (i64 j = 0; j < d; j++) {
            const float grad = scale * (gi[j] - along * pi[j]) + decay * pi[j];
            const float first = mi[j] + (1 - beta1) * (grad - mi[j]);
            const float second = beta2 * vi[j] + (1 - beta2) * grad * grad;
            const float moved = pi[j] * shrink - step_size * first / (sqrtf(second) * inverse + eps);
            mi[j] = first;
            vi[j] = second;
            pi[j] = moved;
            square += moved * moved;
        }
        if (unit) {
            const float length = sqrtf(square), by = 1 / (length > 1e-8f ? length : 1e-8f);
#pragma omp simd
            for (i64 j = 0; j < d; j++) pi[j] *= by;
        }
    }
}

/* ---- groups by rank: group[e] = g where entry e is among its row's ks[g] largest, but not its ks[g - 1] -------- */
void rank_groups(const float *values, const i64 *offsets, const i64 *ks, i64 h, i64 *group, i64 n_rows) {
#pragma omp parallel for schedule(dynamic, 16) if (offsets[n_rows] > FEW / 64)
    for (i64 i = 0; i < n_rows; i++) {
        const i64 first = offsets[i], n = offsets[i + 1] - first;
        float *scratch = malloc((n + 1) * sizeof(float)), *least = malloc(h * sizeof(float));
        i64 *quota = malloc(2 * h * sizeof(i64)), *seen = quota + h, left = n;
        memcpy(scratch, values + first, n * sizeof(float));
        for (i64 g = h - 1; g >= 0; g--) { /* quickselect leaves the k largest in front */
            seen[g] = 0;
            quota[g] = n;
            least[g] = -INFINITY;
            if (ks[g] < left) {
                left = ks[g];
                least[g] = kth_largest(scratch, g == h - 1 || ks[g + 1] > n ? n : ks[g + 1], left);
                quota[g] = left;
                for (i64 e = 0; e < left; e++) quota[g] -= scratch[e] > least[g];
            }
        }
        for (i64 e = first; e < first + n; e++) {
            const float v = values[e];
            i64 mine = h - 1;
            for (i64 g = h - 1; g >= 0; g--) {
                if (v > least[g] || (v == least[g] && seen[g] < quota[g])) mine = g;
                seen[g] += v == least[g];
            }
            group[e] = mine;
        }
        free(scratch);
        free(least);
        free(quota);
    }
}
