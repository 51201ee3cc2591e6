"""L0: how many latents are active a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lightning.metrics.base import SumMetric, require_samples
from sae_lightning.saes.codes import SparseCodes


class L0(SumMetric):
    """Mean number of active latents a sample; ``compute`` gives ``l0``, a float64 scalar."""

    count: Tensor
    active: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("count", dtype=torch.long)
        self.add_sum("active", dtype=torch.long)

    def update(self, codes: SparseCodes) -> None:
        """Add the codes of N samples."""
        self.count += codes.n_samples
        self.active += len(codes.latents)

    def compute(self) -> dict[str, Tensor]:
        require_samples(self.count, self)
        return {"l0": self.active.double() / self.count}
