"""The product of sparse codes and the decoder, with gradients for both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DENSE_FROM = 0.10  # share of active latents above which one dense product is faster (docs/decisions.md)


def sparse_decode(latents: Tensor, values: Tensor, offsets: Tensor, W_dec: Tensor) -> Tensor:
    """Sum of ``values[i] * W_dec[latents[i]]`` over each sample's entries, [N, d_in].

    ``latents`` [nnz] int64, ``values`` [nnz], ``offsets`` [N + 1] int64, ``W_dec`` [d_sae, d_in].
    Cost O(nnz * d_in) forward and backward; codes with more than a tenth of the latents active go
    through one dense product instead.
    """
    n_samples, d_sae = len(offsets) - 1, len(W_dec)
    if len(latents) > DENSE_FROM * n_samples * d_sae:
        sample = torch.arange(n_samples, device=offsets.device)
        rows = torch.repeat_interleave(sample, offsets.diff(), output_size=len(latents))
        dense = values.new_zeros(n_samples * d_sae).scatter(0, rows * d_sae + latents, values)
        return dense.view(n_samples, d_sae) @ W_dec.to(values.dtype)
    return F.embedding_bag(
        latents, W_dec.to(values.dtype), offsets, mode="sum", per_sample_weights=values, include_last_offset=True
    )
