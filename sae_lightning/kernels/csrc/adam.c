/* The optimiser's pass over a matrix. */
#include "common.h"

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
