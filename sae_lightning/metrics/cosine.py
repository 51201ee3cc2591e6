"""Cosine similarity of features and their reconstruction."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lightning.metrics.base import SumMetric, require_pair, require_samples


class Cosine(SumMetric):
    """Mean over samples of x·x̂ / (‖x‖ ‖x̂‖), features as they are (not centred); 0 where a norm is 0.

    ``compute`` gives ``cosine``, a float64 scalar. ValueError for shapes that do not fit.
    """

    n: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("n", dtype=torch.long)
        self.add_sum("total")

    @torch.no_grad()
    def update(self, x: Tensor, reconstruction: Tensor) -> None:
        """Add features and their reconstruction, both [N, d_in], any float type."""
        require_pair(x, reconstruction)
        x, reconstruction = x.double(), reconstruction.double()
        norms = x.norm(dim=1) * reconstruction.norm(dim=1)
        cosines = torch.where(norms > 0, (x * reconstruction).sum(1) / norms, 0.0)
        self.n += len(x)
        self.total += cosines.sum()

    def compute(self) -> dict[str, Tensor]:
        require_samples(self.n, self)
        return {"cosine": self.total / self.n}
