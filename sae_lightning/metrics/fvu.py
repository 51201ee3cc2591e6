"""Fraction of variance unexplained (ViSAEBench §4.2, eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class FVU(Metric):
    """FVU = Σ‖x - x̂‖² / Σ‖x - mean(x)‖² over all samples, and explained_variance = 1 - FVU.

    ``update`` takes features and reconstructions [N, d_in]. The mean is that of the evaluated set; sums
    are kept in float64 around the fixed ``center`` [d_in] (for example the training mean), so that they
    add over batches and ranks without losing digits. NaN when the features do not vary.
    """

    full_state_update = False

    def __init__(self, d_in: int, center: Tensor | None = None) -> None:
        super().__init__()
        center = torch.zeros(d_in) if center is None else center.detach().clone()
        self.register_buffer("center", center.double(), persistent=False)
        self.add_state("residual", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(d_in, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, reconstruction: Tensor) -> None:
        x = features.double()
        self.residual += (x - reconstruction.double()).square().sum()
        x = x - self.center
        self.squares += x.square().sum()
        self.total += x.sum(0)
        self.count += len(x)

    def compute(self) -> dict[str, Tensor]:
        variance = self.squares - self.total.square().sum() / self.count
        fvu = torch.where(variance > 0, self.residual / variance, torch.nan)
        return {"fvu": fvu, "explained_variance": 1 - fvu}
