"""How often each latent fires, and how many never do."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from sae_lightning.saes.codes import SparseCodes


class Firing(Metric):
    """``counts`` [d_sae] int64 of samples on which each latent is active; ``alive`` fired at least once.

    ``dead_share`` is the share of latents that never fired on the evaluated set.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(d_sae, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, codes: SparseCodes) -> None:
        self.counts += torch.bincount(codes.latents, minlength=codes.d_sae)

    def compute(self) -> dict[str, Tensor]:
        alive = (self.counts > 0).sum()
        return {"alive": alive, "dead_share": 1 - alive / len(self.counts)}
