"""Active latents a sample."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from sae_lightning.saes.codes import SparseCodes


class L0(Metric):
    """Mean number of active latents a sample."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("active", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, codes: SparseCodes) -> None:
        self.active += codes.counts().sum()
        self.count += codes.n_samples

    def compute(self) -> dict[str, Tensor]:
        return {"l0": self.active / self.count}
