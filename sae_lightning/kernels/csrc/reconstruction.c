/* Sums over samples that tell how well features are reconstructed, each number read once. */
#include "common.h"

/* x, y [n, d]: features and their reconstruction; center [d].
 * Added to, [d] each: residual += (x - y)^2, total += x - center, squares += (x - center)^2. out [n]: the cosine of
 * x - center and y - center, 0 where one has no length. */
void reconstruction_sums(const float *x, const float *y, const double *center, double *residual, double *total,
                         double *squares, double *out, i64 d, i64 n) {
#pragma omp parallel if (n * d > FEW)
    {
        double *mine = calloc(3 * d, sizeof(double));
        double *res = mine, *tot = mine + d, *sq = mine + 2 * d;
#pragma omp for schedule(static)
        for (i64 i = 0; i < n; i++) {
            const float *a = x + i * d, *b = y + i * d;
            double joint = 0, left = 0, right = 0;
#pragma omp simd reduction(+ : joint, left, right)
            for (i64 j = 0; j < d; j++) {
                const double u = a[j] - center[j], v = b[j] - center[j], r = (double)a[j] - b[j];
                res[j] += r * r;
                tot[j] += u;
                sq[j] += u * u;
                joint += u * v;
                left += u * u;
                right += v * v;
            }
            const double norms = sqrt(left) * sqrt(right);
            out[i] = norms > 0 ? joint / norms : 0;
        }
#pragma omp critical
        for (i64 j = 0; j < d; j++) {
            residual[j] += res[j];
            total[j] += tot[j];
            squares[j] += sq[j];
        }
        free(mine);
    }
}
