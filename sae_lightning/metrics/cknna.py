"""CKNNA: whether codes keep the nearest neighbours that samples have among the features [MSAE App. E; Huh et al. 2024].

Both spaces are compared by their inner products K and L, [n, n], of which only each sample's k nearest others count.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sae_lightning.metrics.base import Score
from sae_lightning.metrics.part import Column, Options, Part, ScoredRun, register
from sae_lightning.registry import one_of
from sae_lightning.saes.codes import DenseCodes, SparseCodes

FORMS = ("unbiased", "centered", "hsic")


class Neighbours(NamedTuple):
    """The ``k`` nearest others of n samples by inner product: ``near`` [n, k] int64 and ``product`` [n, k] float64.

    ``mean`` [n] float64 is each sample's mean product with all n, itself included, and ``spread`` the sum over all n²
    pairs of (product - mean)².
    """

    near: Tensor
    product: Tensor
    mean: Tensor
    spread: float


def cknna(
    first: Tensor | SparseCodes, second: Tensor | SparseCodes, k: int = 10, form: str = "unbiased",
    normalize: bool = True,
) -> float:  # fmt: skip
    """Alignment of the neighbourhoods of n samples in two spaces, features [n, d] or codes; 1 for the same space.

    CKNNA = A(K, L) / √(A(K, K) A(L, L)), where A sees only pairs (i, j) with j among the k nearest of i in both
    spaces. By ``form`` it is

    - ``unbiased``: the unbiased HSIC [Song et al. 2012, eq. 5] of the two matrices with all other pairs set to zero,
      what the code of Huh et al. and of MSAE computes. Its main sum is of K_ij L_ji, so of pairs that are near both
      ways.
    - ``centered``: Σ (K_ij - K̄_i)(L_ij - L̄_i) over those pairs, MSAE's formula for Align, above and below.
    - ``hsic``: the same above, the sum over all pairs below, MSAE's formula as printed. With k much less than n it is
      near 0 for the same space, too.

    ``normalize`` scales every sample to norm 1 first, as Huh et al. do; MSAE takes raw features and codes. NaN where a
    space has nothing to align, as when all samples are zero. Memory O(n · (d + k)) and blocks of K and L.
    ValueError for an unknown form, numbers of samples that differ, or k outside of 2 … n - 1.
    """
    one_of(form, FORMS, "form")
    return alignment(neighbours(first, k, normalize), neighbours(second, k, normalize), form)


@torch.no_grad()
def neighbours(samples: Tensor | SparseCodes, k: int = 10, normalize: bool = True, rows: int = 512) -> Neighbours:
    """The k nearest others of each of n samples, features [n, d] or codes, by products in blocks of ``rows`` rows.

    In float32, or float64 if the samples are; of equal products any may be taken. ValueError for k outside of
    2 … n - 1.
    """
    n = samples.n_samples if isinstance(samples, SparseCodes) else len(samples)
    if not 2 <= k < n or n < 4:
        raise ValueError(f"CKNNA needs 2 <= k < n and at least 4 samples; got k={k} and n={n}.")
    parts, start = [], 0
    for products in _products(samples, normalize, rows):
        means = products.mean(1, dtype=torch.float64)
        spread = (torch.linalg.vector_norm(products - means[:, None].to(products), dim=1).double() ** 2).sum()
        own = torch.arange(len(products), device=products.device)
        products[own, own + start] = -torch.inf
        nearest = products.topk(k, dim=1)
        parts.append((nearest.indices, nearest.values.double(), means, spread))
        start += len(products)
    near, product, mean, spreads = zip(*parts, strict=True)
    return Neighbours(torch.cat(near), torch.cat(product), torch.cat(mean), float(sum(spreads)))


def alignment(first: Neighbours, second: Neighbours, form: str = "unbiased") -> float:
    """CKNNA of two spaces, given the neighbours of the same samples in both; see ``cknna``."""
    if first.near.shape != second.near.shape:
        raise ValueError(
            f"Expected the same samples and k in both spaces; got neighbours {list(first.near.shape)} and "
            f"{list(second.near.shape)}."
        )
    own, other = _entries(first, form), _entries(second, form)
    of_both = _sum(*_shared(own, other), form)
    hsic = form == "hsic"
    wholes = (first.spread, second.spread) if hsic else (_sum(own, own, form), _sum(other, other, form))
    return of_both / (wholes[0] * wholes[1]) ** 0.5 if min(wholes) > 0 else float("nan")


class _Entries(NamedTuple):
    """Entries of an [n, n] matrix, each named by ``key`` = row · n + column, ascending; all others are zero."""

    key: Tensor
    value: Tensor
    n: int


def _entries(space: Neighbours, form: str) -> _Entries:
    """A space's products at its own nearest pairs, less the row's mean but for the form that centers by itself."""
    n = len(space.near)
    key = (torch.arange(n, device=space.near.device)[:, None] * n + space.near).flatten()
    value = space.product if form == "unbiased" else space.product - space.mean[:, None]
    order = key.argsort()
    return _Entries(key[order], value.flatten()[order], n)


def _shared(a: _Entries, b: _Entries) -> tuple[_Entries, _Entries]:
    """Of both, the entries that the other has, too."""
    in_a, in_b = torch.isin(a.key, b.key, assume_unique=True), torch.isin(b.key, a.key, assume_unique=True)
    return _Entries(a.key[in_a], a.value[in_a], a.n), _Entries(b.key[in_b], b.value[in_b], b.n)


def _sum(a: _Entries, b: _Entries, form: str) -> float:
    """Σ a_ij b_ij of two matrices with entries at the same places; by the unbiased HSIC if ``form`` says so."""
    return _hsic(a, b) if form == "unbiased" else float(a.value @ b.value)


def _hsic(a: _Entries, b: _Entries) -> float:
    """Unbiased HSIC of two matrices with zero diagonals [Song et al. 2012, eq. 5], entries at the same places."""
    n = a.n
    turned = a.key % n * n + a.key // n  # b's entry (j, i) beside a's (i, j)
    at = torch.searchsorted(b.key, turned).clamp_max(max(0, len(b.key) - 1))
    both = torch.where(b.key[at] == turned, a.value * b.value[at], 0).sum()
    columns = a.value.new_zeros(n).index_add(0, a.key % n, a.value)
    rows = b.value.new_zeros(n).index_add(0, b.key // n, b.value)
    sums = columns.sum() * rows.sum() / ((n - 1) * (n - 2))
    return float(both + sums - 2 * (columns @ rows) / (n - 2)) / (n * (n - 3))


def _products(samples: Tensor | SparseCodes, normalize: bool, rows: int) -> Iterator[Tensor]:
    """Blocks [rows, n] of the products of all pairs of samples."""
    if isinstance(samples, DenseCodes):
        samples = samples.dense
    if isinstance(samples, SparseCodes):
        yield from _sparse_products(samples, normalize, rows)
        return
    x = samples if samples.dtype == torch.float64 else samples.float()
    x = F.normalize(x, dim=1) if normalize else x
    for block in x.split(rows):
        yield block @ x.T


def _sparse_products(codes: SparseCodes, normalize: bool, rows: int) -> Iterator[Tensor]:
    values = codes.values.detach()
    if normalize:
        norms = values.new_zeros(codes.n_samples).index_add(0, codes.rows(), values.square()).sqrt()
        values = values / norms[codes.rows()]
    scaled = SparseCodes(codes.latents, values, codes.offsets, codes.d_sae)
    for start in range(0, codes.n_samples, rows):
        block = samples_of(scaled, start, start + rows).to_dense()
        yield scaled.decode(block.T.contiguous()).T.contiguous()


def samples_of(codes: SparseCodes, start: int, stop: int) -> SparseCodes:
    """The codes of the samples from ``start`` to before ``stop``."""
    offsets = codes.offsets[start : stop + 1]
    entries = slice(int(offsets[0]), int(offsets[-1]))
    frame = None if codes.frame is None else (codes.frame[0][start:stop], codes.frame[1][start:stop])
    return SparseCodes(codes.latents[entries], codes.values[entries], offsets - offsets[0], codes.d_sae, frame)


def scores(run: ScoredRun, options: Options) -> list[Score]:
    """Whether images have the same neighbours by codes, and by reconstruction, as by features."""
    images, k = run.images(), options["k"]
    n = len(images.raw)
    if n <= max(k, 3):
        return [Score("cknna_left_out", 1, why=f"{n} images have no {k} neighbours each")]
    chosen = np.sort(np.random.default_rng(options["seed"]).permutation(n)[: options["samples"]])
    near = run.shared(f"neighbours {options}", lambda: neighbours(torch.from_numpy(images.raw[chosen]), k))
    rebuilt, codes = torch.from_numpy(images.reconstruction[chosen]), SparseCodes.of_csr(images.codes[chosen])
    return [
        Score("cknna", alignment(near, neighbours(codes, k))),
        Score("cknna_reconstruction", alignment(near, neighbours(rebuilt, k))),
        Score("cknna_samples", len(chosen)),
    ]


PART = register(Part(
    "cknna", scores, needs=("images",), title="Metrics of MSAE", undefined="no image has neighbours to compare",
    columns=(
        Column("of codes", "cknna", better=True, over="CKNNA"),
        Column("of reconstruction", "cknna_reconstruction", better=True, over="CKNNA"),
    ),
))  # fmt: skip
