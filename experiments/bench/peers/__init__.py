"""One real training step of each peer package, for timing against ours.

A builder makes a package's SAE, loss and optimiser on ``device`` and returns a closure that takes features x
[batch, d_in], float32 on ``device``, and does what the package's own trainer does with one batch: forward, its
losses, backward, clipping and the decoder's norm where that trainer has them, Adam at 1e-3, dead-latent counts.
Left out is what comes once a run (the bias from the first batch) and logging. All get the same k, learning rate
without warm-up and nested widths; what else differs from a package's default stands in its adapter. AuxK terms
keep their defaults: the packages turn them on for latents dead for 1000 steps (sae-lens) or 10M samples
(dictionary-learning), or not at all (sparsify, overcomplete), so that a short benchmark sees their bookkeeping
and not their cost.

``precision`` is "32", or "bf16": forward and losses under bfloat16 autocast, weights and optimiser in float32.
Packages are imported when a builder runs; one that cannot be imported raises ImportError then.
"""

from __future__ import annotations

from experiments.bench.peers import dictionary_learning, overcomplete, sae_lens, sparsify
from experiments.bench.peers.common import MATRYOSHKA_FRACTIONS, Builder, Step, matryoshka_widths

__all__ = ["MATRYOSHKA_FRACTIONS", "PEERS", "Builder", "Step", "matryoshka_widths"]

PEERS: dict[str, dict[str, Builder]] = {
    "topk": {
        "overcomplete": overcomplete.topk,
        "sae-lens": sae_lens.topk,
        "sae-lens sparse": sae_lens.topk_sparse,
        "sparsify": sparsify.topk,
        "sparsify groupmax": sparsify.groupmax,
        "dictionary-learning": dictionary_learning.topk,
    },
    "batchtopk": {
        "overcomplete": overcomplete.batchtopk,
        "sae-lens": sae_lens.batchtopk,
        "dictionary-learning": dictionary_learning.batchtopk,
    },
    "relu": {
        "overcomplete": overcomplete.relu,
        "sae-lens": sae_lens.relu,
        "dictionary-learning": dictionary_learning.relu,
    },
    "jumprelu": {
        "overcomplete": overcomplete.jumprelu,
        "sae-lens": sae_lens.jumprelu,
        "dictionary-learning": dictionary_learning.jumprelu,
    },
    "gated": {"sae-lens": sae_lens.gated, "dictionary-learning": dictionary_learning.gated},
    "matryoshka": {"sae-lens": sae_lens.matryoshka, "dictionary-learning": dictionary_learning.matryoshka},
}
