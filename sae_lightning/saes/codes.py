"""Sparse codes: what every encode returns and every decode and metric takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseCodes:
    """Active latents of N samples in compressed rows.

    ``latents`` [nnz] int64 and ``values`` [nnz] list each sample's active latents one sample after
    another; sample i owns the entries ``offsets[i]:offsets[i + 1]`` of ``offsets`` [N + 1] int64.
    """

    latents: Tensor
    values: Tensor
    offsets: Tensor
    d_sae: int

    @property
    def n_samples(self) -> int:
        return len(self.offsets) - 1

    def counts(self) -> Tensor:
        """Active latents of each sample, [N] int64 (its mean is L0)."""
        return self.offsets.diff()

    def rows(self) -> Tensor:
        """Sample index of each entry, [nnz] int64."""
        counts = self.counts()
        sample = torch.arange(self.n_samples, device=counts.device)
        return torch.repeat_interleave(sample, counts, output_size=len(self.latents))

    def to_dense(self) -> Tensor:
        """Dense codes [N, d_sae]; for tests and small N only."""
        dense = self.values.new_zeros(self.n_samples, self.d_sae)
        return dense.index_put((self.rows(), self.latents), self.values)

    @staticmethod
    def select(pre_acts: Tensor, active: Tensor) -> SparseCodes:
        """The entries of dense ``pre_acts`` [N, d_sae] where the mask ``active`` holds, differentiable in them."""
        rows, latents = active.nonzero(as_tuple=True)
        return SparseCodes.gather(pre_acts, rows, latents)

    @staticmethod
    def gather(pre_acts: Tensor, rows: Tensor, latents: Tensor) -> SparseCodes:
        """The entries at (rows, latents), ``rows`` ascending, differentiable in ``pre_acts`` [N, d_sae]."""
        n_samples, d_sae = pre_acts.shape
        values = pre_acts.reshape(-1).gather(0, rows * d_sae + latents)
        offsets = torch.zeros(n_samples + 1, dtype=torch.long, device=rows.device)
        torch.cumsum(torch.bincount(rows, minlength=n_samples), 0, out=offsets[1:])
        return SparseCodes(latents, values, offsets, d_sae)
