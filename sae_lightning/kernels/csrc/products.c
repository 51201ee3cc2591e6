/* Sparse products and their gradients. */
#include "common.h"
#ifdef _OPENMP
#include <omp.h>
#endif

/* ---- decode: out[i] = bias + sum of values[e] * W[latents[e]] over row i's entries ---------------------------
 * W has m rows. Where each is read often and they are long, it is gone through in columns, WIDTH of all rows packed.
 */
enum { WIDTH = 384, PACKED = 16 }; /* entries of a latent that are worth a copy of its row */

static void decode_row(const i64 *latents, const float *values, i64 e, i64 end, i64 last, const float *W, float *o,
                       i64 d) {
    for (; e + 4 <= end; e += 4) {
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
    for (; e < end; e++) {
        const float v = values[e];
        const float *w = W + latents[e] * d;
#pragma omp simd
        for (i64 j = 0; j < d; j++) o[j] += v * w[j];
    }
}

void decode_rows(const i64 *latents, const float *values, const i64 *offsets, const float *W, const float *bias,
                 float *out, i64 d, i64 n, i64 m) {
    const i64 most = d > WIDTH && offsets[n] >= PACKED * m ? WIDTH : d;
    float *packed = most < d ? malloc(m * most * sizeof(float)) : NULL;
#pragma omp parallel if (offsets[n] * d > FEW)
    for (i64 c = 0; c < d; c += most) {
        const i64 width = d - c < most ? d - c : most;
        if (packed) {
#pragma omp for schedule(static)
            for (i64 l = 0; l < m; l++) memcpy(packed + l * width, W + l * d + c, width * sizeof(float));
        }
#pragma omp for schedule(dynamic, 32)
        for (i64 i = 0; i < n; i++) {
            float *o = out + i * d + c;
            if (bias) memcpy(o, bias + c, width * sizeof(float));
            else memset(o, 0, width * sizeof(float));
            decode_row(latents, values, offsets[i], offsets[i + 1], offsets[n], packed ? packed : W, o, width);
        }
    }
    free(packed);
}

/* ---- exact pre-activations of n listed latents of one row: values[c] = <x, W[latents[c]]> + bias --------------- */
void exact_row(const i64 *latents, i64 n, const float *x, const float *W, const float *bias, float *values, i64 d) {
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

/* ---- backward of decode, one latent after another: its row's gradient and the values' gradient at once --------
 * In blocks of rows whose gradients G stay in the cache, every thread for latents of its own. grad_W is added to.
 * Values' gradients go to grad_values[e], or, with h > 0, are added to the matrix grad_values [n_rows / h, n], of which
 * h rows of G belong to a row.
 */
typedef struct {
    float value;
    int32_t row; /* of G in the block */
    i64 place;   /* in grad_values */
} entry;

static void latents_backward(const i64 *latents, const float *values, const i64 *offsets, const float *W,
                             const float *G, float *grad_W, float *grad_values, i64 h, i64 block, i64 d, i64 n,
                             i64 n_rows, i64 me, i64 threads) {
    i64 longest = 0, own = 0;
    for (i64 r = 0; r < n_rows; r += block) {
        const i64 m = offsets[r + block < n_rows ? r + block : n_rows] - offsets[r];
        longest = m > longest ? m : longest;
    }
    entry *sorted = malloc((longest + 1) * sizeof(entry));
    i64 *end = malloc((3 * n + 1) * sizeof(i64)), *number = end + n + 1, *latent = number + n;
    for (i64 l = 0; l < n; l++)
        if (l / 16 % threads == me) latent[own++] = l;
    for (i64 l = 0; l < n; l++) number[l] = own; /* the others' come behind one's own */
    for (i64 c = 0; c < own; c++) number[latent[c]] = c;
    for (i64 r = 0, to; r < n_rows; r = to) {
        to = r + block < n_rows ? r + block : n_rows;
        memset(end, 0, (own + 1) * sizeof(i64));
        for (i64 e = offsets[r]; e < offsets[to]; e++) end[number[latents[e]]]++;
        for (i64 c = 0, sum = 0; c <= own; c++) {
            sum += end[c];
            end[c] = sum - end[c];
        }
        for (i64 i = r; i < to; i++) {
            const i64 base = h ? i / h * n : 0;
            for (i64 e = offsets[i]; e < offsets[i + 1]; e++)
                sorted[end[number[latents[e]]]++] = (entry){values[e], i - r, base + (h ? latents[e] : e)};
        }
        const float *H = G + r * d;
        for (i64 c = 0; c < own; c++) {
            const float *w = W + latent[c] * d;
            float *restrict gw = grad_W + latent[c] * d;
            const entry *t = sorted + (c ? end[c - 1] : 0), *last = sorted + end[c];
            for (; t + 4 <= last; t += 4) {
                const float v0 = t[0].value, v1 = t[1].value, v2 = t[2].value, v3 = t[3].value;
                const float *g0 = H + t[0].row * d, *g1 = H + t[1].row * d;
                const float *g2 = H + t[2].row * d, *g3 = H + t[3].row * d;
                float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
                for (i64 j = 0; j < d; j++) {
                    gw[j] += v0 * g0[j] + v1 * g1[j] + v2 * g2[j] + v3 * g3[j];
                    s0 += g0[j] * w[j];
                    s1 += g1[j] * w[j];
                    s2 += g2[j] * w[j];
                    s3 += g3[j] * w[j];
                }
                const float sums[] = {s0, s1, s2, s3};
                for (int u = 0; u < 4; u++) grad_values[t[u].place] = sums[u] + (h ? grad_values[t[u].place] : 0);
            }
            for (; t < last; t++) {
                const float *g = H + t->row * d;
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (i64 j = 0; j < d; j++) {
                    gw[j] += t->value * g[j];
                    sum += g[j] * w[j];
                }
                grad_values[t->place] = sum + (h ? grad_values[t->place] : 0);
            }
        }
    }
    free(sorted);
    free(end);
}

void decode_backward(const i64 *latents, const float *values, const i64 *offsets, const float *W, const float *G,
                     float *grad_W, float *grad_values, i64 h, i64 block, i64 d, i64 n, i64 n_rows) {
#ifdef _OPENMP
#pragma omp parallel if (offsets[n_rows] * d > FEW)
    latents_backward(latents, values, offsets, W, G, grad_W, grad_values, h, block, d, n, n_rows,
                     omp_get_thread_num(), omp_get_num_threads());
#else
    latents_backward(latents, values, offsets, W, G, grad_W, grad_values, h, block, d, n, n_rows, 0, 1);
#endif
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
