"""Fraction of variance unexplained, M2 of ViSAEBench."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lightning.metrics.base import SumMetric, require_pair, require_samples


class FVU(SumMetric):
    """FVU = E‖x - x̂‖² / E‖x - x̄‖², x̄ the mean over the evaluated set [ViSAEBench §4.2, eq. 4].

    With c the fixed ``center`` [d_in] (zero if None) and y = x - c, the denominator is
    Σ‖y‖² - ‖Σy‖² / n, the same for every c; a c near the mean, such as the store's, keeps the difference
    free of cancellation. Without it the relative error is about 1e-16 · ‖x̄‖² / Var(x), which is harmless
    up to means a million times the deviation. All ranks must use the same centre.

    ``compute`` gives ``fvu`` and ``explained_variance`` = 1 - fvu, float64 scalars; both are NaN when all
    samples are the same. ValueError for shapes that do not fit, or when no sample was seen.
    """

    count: Tensor
    residual: Tensor
    total: Tensor
    squares: Tensor
    center: Tensor

    def __init__(self, d_in: int, center: Tensor | None = None) -> None:
        super().__init__()
        self.d_in = d_in
        self.add_center(d_in, center)
        self.add_sum("count", dtype=torch.long)
        self.add_sum("residual")
        self.add_sum("total", d_in)
        self.add_sum("squares")

    @torch.no_grad()
    def update(self, features: Tensor, reconstruction: Tensor) -> None:
        """Add features and their reconstruction, both [N, d_in], any float type."""
        require_pair(features, reconstruction, self.d_in)
        exact = features.double()
        self.residual += (exact - reconstruction).square().sum()
        exact = exact - self.center
        self.count += len(features)
        self.total += exact.sum(0)
        self.squares += exact.square().sum()

    def compute(self) -> dict[str, Tensor]:
        require_samples(self.count, self)
        variance = (self.squares - self.total.square().sum() / self.count).clamp_min(0)
        fvu = torch.where(variance > 0, self.residual / variance, torch.nan)
        return {"fvu": fvu, "explained_variance": 1 - fvu}
