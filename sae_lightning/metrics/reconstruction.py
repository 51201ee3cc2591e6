"""FVU, R² and cosine together, for a price of one."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lightning.kernels import native
from sae_lightning.metrics.base import SumMetric, require_pair, require_samples
from sae_lightning.metrics.r2 import CONSTANT


class Reconstruction(SumMetric):
    """What ``FVU``, ``R2`` and ``Cosine`` give, from one look at each number.

    All are about the fixed ``center`` [d_in] (zero if None), which must be the same for all ranks. ``compute`` gives
    ``fvu``, ``explained_variance``, ``r2`` and ``cosine``, float64 scalars. ValueError for shapes that do not fit, or
    when no sample was seen.
    """

    count: Tensor
    residual: Tensor
    total: Tensor
    squares: Tensor
    cosines: Tensor
    center: Tensor

    def __init__(self, d_in: int, center: Tensor | None = None) -> None:
        super().__init__()
        self.d_in = d_in
        self.add_center(d_in, center)
        self.add_sum("count", dtype=torch.long)
        self.add_sum("cosines")
        for name in ("residual", "total", "squares"):
            self.add_sum(name, d_in)

    @torch.no_grad()
    def update(self, features: Tensor, reconstruction: Tensor) -> None:
        """Add features and their reconstruction, both [N, d_in], any float type."""
        require_pair(features, reconstruction, self.d_in)
        self.count += len(features)
        if native.available(features, reconstruction):
            sums = (self.residual, self.total, self.squares)
            x, y = features.contiguous(), reconstruction.contiguous()
            self.cosines += native.reconstruction_sums(x, y, self.center, sums).sum()
            return
        exact = features.double()
        self.residual += (exact - reconstruction).square_().sum(0)
        exact = exact - self.center
        rebuilt = reconstruction.double() - self.center
        norms = exact.norm(dim=1) * rebuilt.norm(dim=1)
        self.cosines += torch.where(norms > 0, (exact * rebuilt).sum(1) / norms, 0.0).sum()
        self.total += exact.sum(0)
        self.squares += exact.square_().sum(0)

    def compute(self) -> dict[str, Tensor]:
        require_samples(self.count, self)
        variance = (self.squares - self.total.square() / self.count).clamp_min(0)
        whole = variance.sum()
        fvu = torch.where(whole > 0, self.residual.sum() / whole, torch.nan)
        r2 = torch.where(variance > CONSTANT * self.squares, 1 - self.residual / variance, torch.nan)
        return {
            "fvu": fvu, "explained_variance": 1 - fvu, "r2": r2.nanmean(), "cosine": self.cosines / self.count
        }  # fmt: skip
