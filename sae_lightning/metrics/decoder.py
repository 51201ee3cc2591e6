"""How alike the dictionary's directions are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def decoder_cosine(W_dec: Tensor, rows: int = 2048) -> dict[str, float]:
    """Similarity of decoder rows [d_sae, d_in], in blocks of ``rows``; a zero row has cosine 0 with all.

    Over all pairs of different latents: ``decoder_cosine``, mean |cosine|; ``decoder_orthogonality``, mean signed
    cosine, the DO of MSAE §4.1; ``decoder_squared_cosine``, mean squared cosine, which the values printed there are
    (random directions have 1 / d_in, and 0 in the signed mean). ``decoder_nearest_cosine``: mean over latents of the
    largest cosine with another one. Low is diverse. ValueError for fewer than two rows.
    """
    if len(W_dec) < 2:
        raise ValueError(f"Decoder cosines need at least two latents; got {len(W_dec)}.")
    unit = F.normalize(W_dec.float(), dim=1)
    total, squares, nearest = 0.0, 0.0, 0.0
    for start in range(0, len(unit), rows):
        cosines = unit[start : start + rows] @ unit.T
        own = torch.arange(len(cosines), device=unit.device)
        cosines[own, own + start] = 0.0
        total += float(cosines.abs().sum(dtype=torch.float64))
        squares += float(torch.linalg.vector_norm(cosines, dim=1).double().square().sum())
        cosines[own, own + start] = -2.0
        nearest += float(cosines.max(1).values.sum(dtype=torch.float64))
    n = len(unit)
    pairs = n * (n - 1)
    return {
        "decoder_cosine": total / pairs, "decoder_orthogonality": mean_cosine(W_dec),
        "decoder_squared_cosine": squares / pairs, "decoder_nearest_cosine": nearest / n,
    }  # fmt: skip


def mean_cosine(W_dec: Tensor) -> float:
    """Mean cosine of all pairs of different rows u [n, d] at unit norm: (‖Σ u‖² - Σ ‖u‖²) / (n (n - 1)), in O(n d)."""
    unit = F.normalize(W_dec.double(), dim=1)
    alike = unit.sum(0).square().sum() - unit.square().sum()
    return float(alike) / (len(unit) * (len(unit) - 1))
