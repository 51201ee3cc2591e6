/* The strongest samples of each latent. */
#include "common.h"

/* Codes of n samples, the first of which is called ``first``. Of each latent: fired [d_sae] counts its samples, and
 * strength, sample [d_sae, k] are its k strongest ones, descending, of equals the earlier; all are brought up to date.
 * One thread: an entry that is not among the strongest costs one comparison. */
void rank_samples(const i64 *latents, const float *values, const i64 *offsets, i64 first, i64 k, float *strength,
                  i64 *sample, i64 *fired, i64 n) {
    for (i64 i = 0; i < n; i++)
        for (i64 e = offsets[i]; e < offsets[i + 1]; e++) {
            const i64 latent = latents[e];
            const float x = values[e];
            float *s = strength + latent * k;
            i64 *w = sample + latent * k;
            fired[latent]++;
            if (!(x > s[k - 1])) continue;
            i64 at = k - 1;
            for (; at > 0 && x > s[at - 1]; at--) {
                s[at] = s[at - 1];
                w[at] = w[at - 1];
            }
            s[at] = x;
            w[at] = first + i;
        }
}
