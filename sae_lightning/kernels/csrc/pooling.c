/* Codes of groups of rows: which latents are active on any row of a group. */
#include "common.h"

/* Groups of ``each`` rows. counts [groups]: latents active on any row of a group. */
void count_union(const i64 *latents, const i64 *offsets, i64 each, i64 d_sae, i64 *counts, i64 groups) {
    const i64 words = (d_sae + 63) / 64;
#pragma omp parallel if (offsets[groups * each] > FEW / 64)
    {
        uint64_t *marks = malloc(words * sizeof(uint64_t));
#pragma omp for schedule(dynamic, 4)
        for (i64 g = 0; g < groups; g++) {
            i64 count = 0;
            memset(marks, 0, words * sizeof(uint64_t));
            for (i64 e = offsets[g * each]; e < offsets[(g + 1) * each]; e++)
                marks[latents[e] >> 6] |= (uint64_t)1 << (latents[e] & 63);
            for (i64 i = 0; i < words; i++)
                for (uint64_t bits = marks[i]; bits; bits &= bits - 1) count++;
            counts[g] = count;
        }
        free(marks);
    }
}

/* pooled [starts[groups]]: each group's latents, ascending; place [nnz]: where each entry's latent stands in pooled. */
void fill_union(const i64 *latents, const i64 *offsets, i64 each, i64 d_sae, const i64 *starts, i64 *pooled, i64 *place,
                i64 groups) {
    const i64 words = (d_sae + 63) / 64;
#pragma omp parallel if (offsets[groups * each] > FEW / 64)
    {
        uint64_t *marks = malloc(words * sizeof(uint64_t));
        i64 *slot = malloc(d_sae * sizeof(i64));
#pragma omp for schedule(dynamic, 4)
        for (i64 g = 0; g < groups; g++) {
            i64 next = starts[g];
            memset(marks, 0, words * sizeof(uint64_t));
            for (i64 e = offsets[g * each]; e < offsets[(g + 1) * each]; e++)
                marks[latents[e] >> 6] |= (uint64_t)1 << (latents[e] & 63);
            for (i64 i = 0; i < words; i++)
                for (i64 bit = 0; bit < 64; bit++)
                    if (marks[i] >> bit & 1) {
                        slot[i * 64 + bit] = next;
                        pooled[next++] = i * 64 + bit;
                    }
            for (i64 e = offsets[g * each]; e < offsets[(g + 1) * each]; e++) place[e] = slot[latents[e]];
        }
        free(marks);
        free(slot);
    }
}
