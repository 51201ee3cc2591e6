"""Cosine between a sample and its reconstruction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric


class Cosine(Metric):
    """Mean cosine of features and reconstructions [N, d_in], about the fixed ``center`` [d_in] if one is given."""

    full_state_update = False

    def __init__(self, center: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(()) if center is None else center.detach().clone(), persistent=False)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, reconstruction: Tensor) -> None:
        x, rebuilt = features.float() - self.center, reconstruction.float() - self.center
        self.total += F.cosine_similarity(x, rebuilt, dim=-1).double().sum()
        self.count += len(x)

    def compute(self) -> dict[str, Tensor]:
        return {"cosine": self.total / self.count}
