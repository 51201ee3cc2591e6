"""M1, M2, M5 and the pooling for M3, M4 and M7 with dense codes: what ``evaluate`` compares the scoring pass with.

It is meant to be fast. Codes [b, P, d_sae] are made for a few images at a time, so that they stay in the cache, by one
product through oneDNN and one look at its result; sums over patches are small matrix products; neighbours are summed by
shifts of the grid along each axis, or in bfloat16 by a product with the grid's adjacency, whichever took less time.
Sums are in float32, those over images in float64. Nothing grows with the number of images but the pooled arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from sae_lightning.evaluation.scoring_pass import batches
from sae_lightning.features.store import FeatureStore
from sae_lightning.metrics.monosemanticity import baseline, choose_live
from sae_lightning.metrics.moran import grid_weights
from sae_lightning.saes import BatchTopK

BLOCK = 1 << 21  # codes held at once: 8 MB of float32
WAITING = 64  # images whose codes wait to be sorted into the lists of top images
_one_dnn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class Found(NamedTuple):
    """What a contender found: ``scores`` by name, and images' features, reconstructions and codes, max-pooled.

    ``raw`` and ``rebuilt`` [n, d_in], ``codes`` (called when they are wanted) [n, d_sae].
    """

    scores: dict[str, float]
    raw: np.ndarray
    rebuilt: np.ndarray
    codes: Callable[[], csr_matrix]


class Dense:
    """A BatchTopK SAE whose products are in ``dtype``."""

    def __init__(self, run: Path, dtype: torch.dtype) -> None:
        self.sae, self.dtype = BatchTopK.load(run), dtype
        b_enc = self.sae.b_enc - self.sae.W_enc @ self.sae.b_pre
        self.encoder, self.b_enc = self.sae.W_enc.detach().to(dtype), b_enc.detach().to(dtype)
        self.decoder = self.sae.W_dec.detach().T.contiguous().to(dtype)
        self.b_pre, self.cut = self.sae.b_pre.detach().to(dtype), max(0.0, float(self.sae.threshold))

    def encode(self, features: Tensor) -> Tensor:
        """Codes [n, d_sae] of raw features [n, d_in]."""
        x = self.sae.normalizer.normalize(features).to(self.dtype)
        return torch.nn.functional.threshold_(_linear(x, self.encoder, self.b_enc), self.cut, 0)

    def decode(self, codes: Tensor) -> Tensor:
        """Reconstructions [n, d_in] float32 of codes [n, d_sae]."""
        return self.sae.normalizer.denormalize(_linear(codes, self.decoder, self.b_pre).float())


def _by_one_dnn(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a product of this type on this processor; of bfloat16 it needs AVX-512 at least."""
    if _one_dnn is None or not torch.backends.mkldnn.is_available():
        return False
    return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _linear(x: Tensor, W: Tensor, bias: Tensor) -> Tensor:
    """x Wᵀ + bias; oneDNN's product is the fastest of PyTorch's on the CPU in both types."""
    if not _by_one_dnn(x.dtype):
        return torch.nn.functional.linear(x, W, bias)
    return _one_dnn(x, W, bias, "none", [], "")


class Block:
    """Some images, of which everything is computed when it is first asked for."""

    def __init__(self, sae: Dense, first: int, read: Tensor) -> None:
        self.sae, self.read, self.images = sae, read, slice(first, first + len(read))

    @cached_property
    def features(self) -> Tensor:
        """[b, P, d_in] float32."""
        return self.read.float()

    @cached_property
    def codes(self) -> Tensor:
        """[b, P, d_sae]."""
        return self.sae.encode(self.read.flatten(0, 1)).unflatten(0, self.read.shape[:2])

    @cached_property
    def rebuilt(self) -> Tensor:
        """[b, P, d_in] float32."""
        return self.sae.decode(self.codes.flatten(0, 1)).unflatten(0, self.read.shape[:2])

    @cached_property
    def pooled(self) -> Tensor:
        """[b, d_sae] float32."""
        return self.codes.amax(1).float()


class Pass(Protocol):
    """One of the metrics: told of all blocks in turn."""

    def add(self, block: Block) -> None: ...


class Moran:
    """M1: Moran's I of every latent on every image, row-standardised queen weights."""

    def __init__(
        self, d_sae: int, grid: tuple[int, int], min_active: int, min_variance: float, min_images: int
    ) -> None:  # fmt: skip
        weights = grid_weights(grid, "queen", row_standardized=True)
        self.grid, self.patches, degree = grid, len(weights.reach), weights.start.diff()
        self.least = (min_active, min_variance, min_images)
        self.ones, self.share = torch.ones(1, self.patches), (1 / degree.float())[None]
        self.reach = torch.cat([self.ones, weights.reach.float()[None]])
        rows = torch.arange(self.patches).repeat_interleave(degree)
        self.adjacency = torch.zeros(self.patches, self.patches).index_put((rows, weights.near), torch.tensor(1.0))
        self.total, self.images = torch.zeros(d_sae, dtype=torch.float64), torch.zeros(d_sae)

    def add(self, block: Block) -> None:
        z = block.codes.float()
        plain, reached = (self.reach @ z).unbind(1)
        spread = (self.ones @ z.square())[:, 0] - plain.square() / self.patches
        joint = (self.share @ self._around(block.codes, z).mul_(z))[:, 0]
        mean, count = plain / self.patches, (self.ones @ z.sign())[:, 0]
        i = (joint - mean * reached + mean.square() * self.patches) / spread
        valid = (count >= self.least[0]) & (spread / self.patches > self.least[1])
        self.total += torch.where(valid, i, 0).sum(0)
        self.images += valid.sum(0)

    def _around(self, codes: Tensor, z: Tensor) -> Tensor:
        """The sum of each patch's neighbours, [b, P, d_sae] float32."""
        if codes.dtype == torch.bfloat16:
            return torch.matmul(self.adjacency.bfloat16(), codes).float()
        grid = z.unflatten(1, self.grid)
        rows = grid.clone()
        rows[:, 1:] += grid[:, :-1]
        rows[:, :-1] += grid[:, 1:]
        square = rows.clone()
        square[:, :, 1:] += rows[:, :, :-1]
        square[:, :, :-1] += rows[:, :, 1:]
        return square.sub_(grid).flatten(1, 2)

    def scores(self) -> dict[str, float]:
        known = self.images >= self.least[2]
        mean = float((self.total / self.images)[known].mean())
        return {"moran": mean, "moran_evaluable": float(known.double().mean())}


class Reconstruction:
    """M2: FVU, L0 and dead latents."""

    def __init__(self, d_in: int, d_sae: int) -> None:
        self.residual, self.squares, self.active, self.count = 0.0, 0.0, 0, 0
        self.total, self.peak = torch.zeros(d_in, dtype=torch.float64), torch.zeros(d_sae)

    def add(self, block: Block) -> None:
        x, codes = block.features.flatten(0, 1), block.codes.flatten(0, 1)
        x = x - block.sae.sae.normalizer.mean
        y = block.rebuilt.flatten(0, 1) - block.sae.sae.normalizer.mean
        self.residual += float(torch.dist(x, y) ** 2)
        self.squares += float(x.norm() ** 2)
        self.total += x.sum(0)
        self.active += int(torch.count_nonzero(codes))
        self.peak = torch.maximum(self.peak, codes.amax(0).float())
        self.count += len(x)

    def scores(self) -> dict[str, float]:
        variance = self.squares - float(self.total.square().sum()) / self.count
        dead = float((self.peak == 0).double().mean())
        return {"fvu": self.residual / variance, "l0": self.active / self.count, "dead_share": dead}


class ImagePools:
    """M3's pooling: the maximum over patches of features and reconstruction."""

    def __init__(self, n: int, d_in: int) -> None:
        self.raw, self.rebuilt = torch.empty(n, d_in), torch.empty(n, d_in)

    def add(self, block: Block) -> None:
        self.raw[block.images] = block.features.amax(1)
        self.rebuilt[block.images] = block.rebuilt.amax(1)


class CodePool:
    """M4's and M7's pooling: the maximum over patches of the codes."""

    def __init__(self, n: int, d_sae: int) -> None:
        self.codes = torch.empty(n, d_sae)

    def add(self, block: Block) -> None:
        self.codes[block.images] = block.pooled


class TopImages:
    """M5: each latent's strongest images, and how alike they are by the ``judge``'s embeddings [n, d]."""

    def __init__(self, d_sae: int, top: int, judge: Tensor) -> None:
        self.judge, self.top, self.seen = judge, top, 0
        self.strength, self.images = torch.full((top, d_sae), -1.0), torch.zeros(top, d_sae, dtype=torch.long)
        self.least = torch.full((d_sae,), torch.inf)
        self.waiting: list[Tensor] = []

    def add(self, block: Block) -> None:
        self.waiting.append(block.pooled)
        if len(self.waiting) * len(block.pooled) >= WAITING:
            self._sort_in()

    def _sort_in(self) -> None:
        if not self.waiting:
            return
        pooled = torch.cat(self.waiting)
        self.waiting = []
        self.least = torch.minimum(self.least, pooled.amin(0))
        self.strength, place = torch.cat([self.strength, pooled]).topk(self.top, dim=0)
        held = self.images.gather(0, place.clamp_max(self.top - 1))
        self.images = torch.where(place < self.top, held, place - self.top + self.seen)
        self.seen += len(pooled)

    def scores(self) -> dict[str, float]:
        self._sort_in()
        latents = choose_live(self.strength[0])
        unit = torch.nn.functional.normalize(self.judge, dim=1)[self.images[:, latents].T]
        w = (self.strength[:, latents].T - self.least[latents, None]).clamp_min(0)
        pairs = torch.triu(w[:, :, None] * w[:, None, :], 1)
        score = (pairs * (unit @ unit.mT)).sum((1, 2)) / pairs.sum((1, 2))
        floor = baseline(self.judge)
        return {"monosemanticity": (float(score.nanmean()) - floor) / (1 - floor)}


def evaluate(
    run: Path, store: FeatureStore, images: int, judge: Tensor, moran: Mapping[str, Any], top: int, dtype: torch.dtype,
    one_pass: bool, batch_tokens: int = 4096,
) -> Found:  # fmt: skip
    """The first ``images`` of ``store``; each metric encodes them for itself, or all share ``one_pass``."""
    sae = Dense(run, dtype)
    d_in, d_sae, patches = sae.sae.d_in, sae.sae.d_sae, store.n_patches
    scored = [Moran(d_sae, store.grid, **moran), Reconstruction(d_in, d_sae), TopImages(d_sae, top, judge)]
    pools, codes = ImagePools(images, d_in), CodePool(images, d_sae)
    passes: list[Pass] = [*scored, pools, codes]
    groups = [passes] if one_pass else [*([each] for each in passes), [CodePool(images, d_sae)]]  # the last is M7's
    with torch.no_grad():
        for group in groups:
            for first, read in batches(store, 0, images, max(1, batch_tokens // patches)):
                for at, part in enumerate(read.split(size := max(1, BLOCK // (patches * d_sae)))):
                    block = Block(sae, first + at * size, part)
                    for each in group:
                        each.add(block)
        scores = {name: value for each in scored for name, value in each.scores().items()}
    return Found(scores, pools.raw.numpy(), pools.rebuilt.numpy(), lambda: csr_matrix(codes.codes.numpy()))
