/* Sparse products and their gradients. */
#include "common.h"

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
