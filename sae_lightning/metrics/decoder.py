"""How alike the dictionary's directions are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def decoder_cosine(W_dec: Tensor, rows: int = 2048) -> dict[str, float]:
    """Similarity of decoder rows [d_sae, d_in], in blocks of ``rows``.

    ``decoder_cosine``: mean |cosine| over all pairs of different latents; ``decoder_nearest_cosine``: mean
    over latents of the largest cosine with another one. Low is diverse. ValueError for fewer than two rows.
    """
    if len(W_dec) < 2:
        raise ValueError(f"Decoder cosines need at least two latents; got {len(W_dec)}.")
    unit = F.normalize(W_dec.float(), dim=1)
    total, nearest = 0.0, 0.0
    for start in range(0, len(unit), rows):
        cosines = unit[start : start + rows] @ unit.T
        own = torch.arange(len(cosines), device=unit.device)
        cosines[own, own + start] = 0.0
        total += float(cosines.abs().sum(dtype=torch.float64))
        cosines[own, own + start] = -2.0
        nearest += float(cosines.max(1).values.sum(dtype=torch.float64))
    n = len(unit)
    return {"decoder_cosine": total / (n * (n - 1)), "decoder_nearest_cosine": nearest / n}
