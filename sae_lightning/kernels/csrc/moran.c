/* Moran's I of sparse activations on a patch grid. */
#include "common.h"

/* Groups of entries, one for each latent on each image: group g owns entries order[starts[g]:starts[g + 1]], entry e lies
 * on row rows[t], its patch is rows[t] % patches. Neighbours of patch p: near[from[p]:from[p + 1]] with weights ``weight``;
 * reach[p] is the sum of p's weights as a row and as a column, whole that of all weights.
 * out [groups]: I, or NaN with fewer than ``least`` active patches or a variance of at most ``flat``. */
void moran(const i64 *starts, const i64 *order, const i64 *rows, const float *values, i64 patches, const i64 *from,
           const i64 *near, const double *weight, const double *reach, double whole, i64 least, double flat,
           double *out, i64 groups) {
#pragma omp parallel if (starts[groups] > FEW / 64)
    {
        double *grid = calloc(patches, sizeof(double));
#pragma omp for schedule(dynamic, 256)
        for (i64 g = 0; g < groups; g++) {
            const i64 begin = starts[g], end = starts[g + 1];
            double sum = 0, squares = 0, joint = 0, reached = 0;
            out[g] = NAN;
            if (end - begin < least) continue;
            for (i64 t = begin; t < end; t++) {
                const double x = values[order[t]];
                sum += x;
                squares += x * x;
                grid[rows[t] % patches] = x;
            }
            const double mean = sum / patches, spread = squares - sum * mean;
            if (spread / patches > flat) {
                for (i64 t = begin; t < end; t++) {
                    const i64 p = rows[t] % patches;
                    double around = 0;
                    for (i64 k = from[p]; k < from[p + 1]; k++) around += weight[k] * grid[near[k]];
                    joint += grid[p] * around;
                    reached += grid[p] * reach[p];
                }
                out[g] = patches / whole * (joint - mean * reached + mean * mean * whole) / spread;
            }
            for (i64 t = begin; t < end; t++) grid[rows[t] % patches] = 0;
        }
        free(grid);
    }
}
