"""Sparse codes: what every encode returns and every decode and metric takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from sae_lightning.kernels import dense_levels, nested_decode, sparse_decode
from sae_lightning.kernels.portable import offsets_of, rows_of
from sae_lightning.kernels.products import grouped, rank_groups, union
from sae_lightning.kernels.selection import keep
from sae_lightning.registry import one_of

POOLS = ("max", "mean")  # of a latent's values on an image's tokens

Frame = tuple[Tensor, Tensor]  # shift and scale [N, 1] that an input norm took from each sample


class SparseCodes:
    """Active latents of N samples in compressed rows.

    ``latents`` [nnz] int64 and ``values`` [nnz] (positive) list each sample's active latents, ascending, one
    sample after another; sample i owns the entries ``offsets[i]:offsets[i + 1]`` of ``offsets`` [N + 1] int64.
    """

    _images: tuple[int, tuple[Tensor, Tensor, Tensor]] | None = None

    def __init__(
        self, latents: Tensor, values: Tensor, offsets: Tensor, d_sae: int, frame: Frame | None = None
    ) -> None:
        self.latents, self.values, self.offsets = latents, values, offsets
        self.d_sae, self.frame = d_sae, frame

    def __repr__(self) -> str:
        """For example ``SparseCodes(4 x 256, 8.0 active a sample, cpu)``."""
        each = self.nnz / max(self.n_samples, 1)
        return f"SparseCodes({self.n_samples} x {self.d_sae}, {each:.1f} active a sample, {self.values.device})"

    @property
    def n_samples(self) -> int:
        return len(self.offsets) - 1

    @property
    def nnz(self) -> int:
        """Active latents of all samples together."""
        return len(self.latents)

    def counts(self) -> Tensor:
        """Active latents of each sample, [N] int64 (its mean is L0)."""
        return self.offsets.diff()

    def rows(self) -> Tensor:
        """Sample index of each entry, [nnz] int64."""
        return rows_of(self.offsets, self.nnz)

    def fired(self) -> Tensor:
        """Which latents are active on some sample, [d_sae] bool."""
        mask = torch.zeros(self.d_sae, dtype=torch.bool, device=self.latents.device)
        mask[self.latents] = True
        return mask

    def to_dense(self) -> Tensor:
        """Dense codes [N, d_sae]."""
        dense = self.values.new_zeros(self.n_samples, self.d_sae)
        return dense.index_put((self.rows(), self.latents), self.values)

    def decode(self, W_dec: Tensor, bias: Tensor | None = None) -> Tensor:
        """codes · W_dec + bias, [N, d_in]; differentiable once in values, W_dec and bias."""
        return sparse_decode(self.latents, self.values, self.offsets, W_dec, bias)

    def decode_levels(self, ks: Tensor, W_dec: Tensor, bias: Tensor) -> Tensor:
        """Reconstructions [N, h, d_in] from each sample's ``ks[level]`` largest entries; the last from all entries.

        ``ks`` [h] int64 ascends.
        """
        group = rank_groups(self.values.detach(), self.offsets, ks)
        entries = grouped(self.latents, self.values, self.offsets, group, len(ks))
        return nested_decode(*entries, W_dec, bias, len(ks))

    def total(self, weights: Tensor | None = None) -> Tensor:
        """Sum of all values, each times its latent's weight ([d_sae]) if given; a scalar."""
        return (self.values if weights is None else self.values * weights[self.latents]).sum()

    def map(self, function: Callable[[Tensor, Tensor | slice], Tensor]) -> SparseCodes:
        """Codes with values ``function(values, latents)``, of which only positive ones stay."""
        values = function(self.values, self.latents)
        return self.where(values.detach() > 0, values)

    def where(self, mask: Tensor, values: Tensor | None = None) -> SparseCodes:
        """The entries where ``mask`` [nnz] holds, with new ``values`` [nnz] if given."""
        values = self.values if values is None else values
        return SparseCodes(*keep((self.latents, values, self.offsets), mask), self.d_sae, self.frame)

    def top(self, k: int) -> SparseCodes:
        """The ``k`` largest entries of each sample, of equal ones the lower latents (progressive recovery)."""
        ks = torch.tensor([k, k + 1], device=self.offsets.device)
        return self.where(rank_groups(self.values.detach(), self.offsets, ks) == 0)

    def without_first(self, n: int, each: int) -> SparseCodes:
        """Codes without the first ``n`` of every ``each`` samples: of tokens, those of the patches."""
        if not n:
            return self
        stays = torch.arange(self.n_samples, device=self.offsets.device) % each >= n
        mask = stays[self.rows()]
        return SparseCodes(self.latents[mask], self.values[mask], offsets_of(self.counts()[stays]), self.d_sae)

    def pool(self, each: int, how: str = "max") -> SparseCodes:
        """Codes of images from those of their ``each`` consecutive tokens: the ``max`` or ``mean`` of every latent.

        [N / each] samples, differentiable in the values. ValueError when the samples do not divide into images.
        """
        one_of(how, POOLS, "pooling")
        if each < 1 or self.n_samples % each:
            raise ValueError(f"{self.n_samples} samples are not whole images of {each} tokens.")
        return self if each == 1 else self._pool(each, how)

    def by_image(self, each: int) -> tuple[Tensor, Tensor, Tensor]:
        """Which latents are active on each image of ``each`` consecutive tokens, offsets of the images, and the place
        of every entry's latent among them; see ``kernels.products.union``. Found once.
        """
        if self._images is None or self._images[0] != each:
            self._images = (each, union(self.latents, self.offsets, each, self.d_sae))
        return self._images[1]

    def _pool(self, each: int, how: str) -> SparseCodes:
        latents, offsets, place = self.by_image(each)
        nothing = self.values.new_zeros(len(latents))
        if how == "max":
            values = nothing.scatter_reduce(0, place, self.values, "amax")
        else:
            values = nothing.index_add(0, place, self.values) / each
        return SparseCodes(latents, values, offsets, self.d_sae)

    def csr(self) -> csr_matrix:
        """The same as SciPy holds it, [N, d_sae] float32."""
        rows = (self.values.float().cpu().numpy(), self.latents.cpu().numpy(), self.offsets.cpu().numpy())
        return csr_matrix(rows, (self.n_samples, self.d_sae))

    @staticmethod
    def of_csr(matrix: csr_matrix) -> SparseCodes:
        """The rows of ``matrix`` [N, d_sae], float32."""
        rows = matrix.sorted_indices()
        latents, offsets = (torch.from_numpy(index.astype(np.int64)) for index in (rows.indices, rows.indptr))
        return SparseCodes(latents, torch.from_numpy(rows.data.astype(np.float32)), offsets, matrix.shape[1])

    @staticmethod
    def select(pre_acts: Tensor, active: Tensor) -> SparseCodes:
        """The entries of dense ``pre_acts`` [N, d_sae] where the mask ``active`` holds, differentiable in them."""
        rows, latents = active.nonzero(as_tuple=True)
        offsets = offsets_of(torch.bincount(rows, minlength=len(pre_acts)))
        return SparseCodes(latents, pre_acts[rows, latents], offsets, pre_acts.shape[1])


class DenseCodes(SparseCodes):
    """Codes held as a matrix ``dense`` [N, d_sae] of values >= 0, for variants with many active latents.

    Decode, sums and counts use the matrix; the lists are made when something asks for them.
    """

    def __init__(self, dense: Tensor, frame: Frame | None = None) -> None:
        self.dense, self.frame, self.d_sae = dense, frame, dense.shape[1]

    @cached_property
    def _lists(self) -> SparseCodes:
        with torch.set_grad_enabled(self.dense.requires_grad):  # kept for later, whoever asks first
            return SparseCodes.select(self.dense, self.dense.detach() > 0)

    latents = property(lambda self: self._lists.latents)  # type: ignore[assignment]
    values = property(lambda self: self._lists.values)  # type: ignore[assignment]
    offsets = property(lambda self: self._lists.offsets)  # type: ignore[assignment]

    @property
    def n_samples(self) -> int:
        return len(self.dense)

    @cached_property
    def nnz(self) -> int:  # type: ignore[override]
        return int((self.dense.detach() > 0).sum())

    def counts(self) -> Tensor:
        return (self.dense.detach() > 0).sum(1)

    def fired(self) -> Tensor:
        if not len(self.dense):
            return self.dense.new_zeros(self.d_sae, dtype=torch.bool)
        return self.dense.detach().amax(0) > 0

    def to_dense(self) -> Tensor:
        return self.dense

    def decode(self, W_dec: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.dense @ W_dec if bias is None else torch.addmm(bias, self.dense, W_dec)

    def decode_levels(self, ks: Tensor, W_dec: Tensor, bias: Tensor) -> Tensor:
        return dense_levels(self.dense, W_dec, bias, ks)

    def _pool(self, each: int, how: str) -> SparseCodes:
        images = self.dense.unflatten(0, (-1, each))
        return DenseCodes(images.amax(1) if how == "max" else images.mean(1))

    def total(self, weights: Tensor | None = None) -> Tensor:
        sums = self.dense.sum(0)
        return sums.sum() if weights is None else sums @ weights

    def map(self, function: Callable[[Tensor, Tensor | slice], Tensor]) -> SparseCodes:
        values = torch.relu(function(self.dense, slice(None)))
        return DenseCodes(torch.where(self.dense.detach() > 0, values, 0), self.frame)
