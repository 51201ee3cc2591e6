"""How often each latent fires, and how many never do."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lightning.metrics.base import SumMetric, require_samples
from sae_lightning.saes.codes import SparseCodes


class Firing(SumMetric):
    """Counts each latent's active samples in ``counts`` [d_sae] int64.

    A latent is alive when it fired at least once on the evaluated set. ``compute`` gives ``dead_share``
    (float64) and ``alive`` (int64), scalars. ValueError for codes of another d_sae.
    """

    count: Tensor
    counts: Tensor

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.d_sae = d_sae
        self.add_sum("count", dtype=torch.long)
        self.add_sum("counts", d_sae, dtype=torch.long)

    def update(self, codes: SparseCodes) -> None:
        """Add the codes of N samples."""
        if codes.d_sae != self.d_sae:
            raise ValueError(f"Expected codes of {self.d_sae} latents; got {codes.d_sae}.")
        self.count += codes.n_samples
        self.counts += torch.bincount(codes.latents, minlength=self.d_sae)

    def compute(self) -> dict[str, Tensor]:
        require_samples(self.count, self)
        alive = (self.counts > 0).sum()
        return {"dead_share": 1 - alive.double() / self.d_sae, "alive": alive}
