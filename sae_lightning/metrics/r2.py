"""R²: the mean coefficient of determination of the features' dimensions [MonoLoss App. B]."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lightning.metrics.base import SumMetric, require_pair, require_samples

CONSTANT = 1e-12  # a variance below this share of the mean square about the center is rounding


class R2(SumMetric):
    """Mean over dimensions of R²_d = 1 - Σ (x_d - x̂_d)² / Σ (x_d - x̄_d)², x̄ the mean over the evaluated set.

    Unlike ``FVU``, whose dimensions share one denominator, every dimension weighs the same. With c the fixed
    ``center`` [d_in] (zero if None) and y = x - c, the denominator is Σ y_d² - (Σ y_d)² / n, the same for every c; a c
    near the mean, such as the store's, keeps it free of cancellation. All ranks must use the same center.

    A dimension that is constant on the evaluated set has no variance to explain and is left out of the mean (sklearn's
    ``r2_score`` would count it 1 or 0); numerically, one whose variance is below 1e-12 of its mean square about c.

    ``compute`` gives ``r2``, a float64 scalar, NaN when all dimensions are constant. ValueError for shapes that do
    not fit, or when no sample was seen.
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
        for name in ("residual", "total", "squares"):
            self.add_sum(name, d_in)

    @torch.no_grad()
    def update(self, features: Tensor, reconstruction: Tensor) -> None:
        """Add features and their reconstruction, both [N, d_in], any float type."""
        require_pair(features, reconstruction, self.d_in)
        exact = features.double()
        self.residual += (exact - reconstruction).square_().sum(0)
        exact = exact - self.center
        self.count += len(features)
        self.total += exact.sum(0)
        self.squares += exact.square_().sum(0)

    def per_dimension(self) -> Tensor:
        """R² of each dimension, [d_in] float64; NaN for a constant one."""
        require_samples(self.count, self)
        variance = self.squares - self.total.square() / self.count
        return torch.where(variance > CONSTANT * self.squares, 1 - self.residual / variance, torch.nan)

    def compute(self) -> dict[str, Tensor]:
        return {"r2": self.per_dimension().nanmean()}
