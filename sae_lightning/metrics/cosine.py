"""Cosine similarity of features and their reconstruction."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lightning.metrics.base import SumMetric, require_pair, require_samples


class Cosine(SumMetric):
    """Mean over samples of x·x̂ / (‖x‖ ‖x̂‖), both taken about the fixed ``center`` [d_in] if one is given.

    A sample counts 0 where a norm is 0. ``compute`` gives ``cosine``, a float64 scalar. ValueError for
    shapes that do not fit, or when no sample was seen.
    """

    count: Tensor
    total: Tensor
    center: Tensor

    def __init__(self, center: Tensor | None = None) -> None:
        super().__init__()
        center = torch.zeros(()) if center is None else torch.as_tensor(center).detach().clone()
        self.register_buffer("center", center.double(), persistent=False)
        self.add_sum("count", dtype=torch.long)
        self.add_sum("total")

    @torch.no_grad()
    def update(self, features: Tensor, reconstruction: Tensor) -> None:
        """Add features and their reconstruction, both [N, d_in], any float type."""
        require_pair(features, reconstruction, len(self.center) if self.center.ndim else None)
        x, rebuilt = features.double() - self.center, reconstruction.double() - self.center
        norms = x.norm(dim=1) * rebuilt.norm(dim=1)
        cosines = torch.where(norms > 0, (x * rebuilt).sum(1) / norms, 0.0)
        self.count += len(x)
        self.total += cosines.sum()

    def compute(self) -> dict[str, Tensor]:
        require_samples(self.count, self)
        return {"cosine": self.total / self.count}
