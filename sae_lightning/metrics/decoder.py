"""How alike the decoder's directions are; low values mean that latents do not repeat each other."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def decoder_mean_cosine(W_dec: Tensor, block: int = 1024) -> dict[str, float]:
    """Two summaries of the cosines between rows of ``W_dec`` [d_sae, d_in].

    ``decoder_cosine`` is the mean |cosine| over all pairs of different latents, ``decoder_nearest_cosine``
    the mean over latents of the largest signed cosine with another one. Rows of zero norm have cosine 0.
    Memory is O(block · d_sae). ValueError for fewer than two latents.
    """
    if W_dec.ndim != 2 or len(W_dec) < 2:
        raise ValueError(f"Expected a decoder [d_sae, d_in] of at least two latents; got {list(W_dec.shape)}.")
    d_sae = len(W_dec)
    rows = W_dec.float()
    norms = rows.norm(dim=1, keepdim=True)
    rows = torch.where(norms > 0, rows / norms, 0.0)
    absolute = rows.new_zeros((), dtype=torch.float64)
    nearest = rows.new_zeros((), dtype=torch.float64)
    for start in range(0, d_sae, block):
        cosines = rows[start : start + block] @ rows.T
        own = torch.arange(len(cosines), device=rows.device)
        cosines[own, start + own] = 0
        absolute += cosines.abs().sum(dtype=torch.float64)
        cosines[own, start + own] = -torch.inf
        nearest += cosines.amax(1).sum(dtype=torch.float64)
    return {
        "decoder_cosine": float(absolute / (d_sae * (d_sae - 1))),
        "decoder_nearest_cosine": float(nearest / d_sae),
    }
