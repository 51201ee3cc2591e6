"""Moran's I: whether a latent fires on connected regions of an image, M1 of ViSAEBench."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_lightning.kernels import native, sparse_decode
from sae_lightning.kernels.portable import by_latent, offsets_of
from sae_lightning.metrics.base import Score, SumMetric, of_one_rank
from sae_lightning.metrics.intervals import averaged, named
from sae_lightning.metrics.part import Column, Options, Part, ScoredRun, Streamed, nothing, on_patches, register
from sae_lightning.metrics.protocols import RELEASED
from sae_lightning.registry import one_of
from sae_lightning.saes.codes import SparseCodes

STEPS = {
    "rook": ((-1, 0), (0, -1), (0, 1), (1, 0)),
    "queen": ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)),
}


class Weights(NamedTuple):
    """Spatial weights of a grid's P patches: patch p's neighbours are ``near[start[p]:start[p + 1]]``.

    ``start`` [P + 1] and ``near`` int64, ``weight`` float64 beside ``near``; ``reach`` [P] is the sum of a patch's
    weights as a row and as a column, ``whole`` that of all.
    """

    start: Tensor
    near: Tensor
    weight: Tensor
    reach: Tensor
    whole: float


def grid_weights(grid: tuple[int, int], contiguity: str = "queen", row_standardized: bool = False) -> Weights:
    """Weights of neighbouring patches of ``grid`` (rows, columns): 1 each, or each row's summing to 1.

    ValueError for an unknown contiguity, or a grid of a single patch.
    """
    one_of(contiguity, STEPS, "contiguity")
    rows, columns = grid
    if rows < 1 or columns < 1 or rows * columns < 2:
        raise ValueError(f"A grid of {rows} x {columns} patches has no neighbours; Moran's I needs patch tokens.")
    near = [
        [(r + y) * columns + c + x for y, x in STEPS[contiguity] if 0 <= r + y < rows and 0 <= c + x < columns]
        for r in range(rows)
        for c in range(columns)
    ]
    degree = torch.tensor([len(each) for each in near])
    flat = torch.tensor([q for each in near for q in each])
    weight = (1 / degree.double()).repeat_interleave(degree) if row_standardized else torch.ones(len(flat)).double()
    row = torch.arange(len(near)).repeat_interleave(degree)
    reach = torch.zeros(len(near), dtype=torch.float64).index_add(0, row, weight).index_add(0, flat, weight)
    return Weights(offsets_of(degree), flat, weight, reach, float(weight.sum()))


def morans_i(
    codes: SparseCodes, weights: Weights, min_active: int = 5, min_variance: float = 1e-8, max_share: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Moran's I of every latent on every image that it fires on [ViSAEBench §4.1, eq. 2].

    ``codes`` hold P patches an image, in the grid's order. Returns latents [m], images [m] int64 and I [m] float64, NaN
    where fewer than ``min_active`` patches are active or a share above ``max_share``, or the variance over all P is at
    most ``min_variance``. Exact: silent patches enter through sums, so that the cost is that of the active ones and
    their neighbours.
    """
    patches = len(weights.start) - 1
    if codes.n_samples % patches:
        raise ValueError(f"{codes.n_samples} samples are not whole images of {patches} patches.")
    pooled, offsets, place = codes.by_image(patches)
    images = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=pooled.device), offsets.diff())
    values = codes.values.detach()
    if native.available(values):
        found = native.moran(place, values.contiguous(), codes.offsets, len(pooled), weights, min_active, min_variance)
    else:
        found = _morans_i(place, values.double(), codes.offsets, len(pooled), weights, min_active, min_variance)
    if max_share < 1:
        active = torch.bincount(place, minlength=len(pooled))
        found = torch.where(active <= int(max_share * patches), found, torch.nan)
    return pooled, images, found


def _morans_i(
    place: Tensor, values: Tensor, offsets: Tensor, groups: int, weights: Weights, min_active: int, min_variance: float
) -> Tensor:
    """The same in PyTorch's operators: each active patch looks its neighbours up among its group's patches."""
    start, near, weight, reach = (t.to(values.device) for t in weights[:4])
    patches = len(reach)
    starts, order, rows = by_latent(place, offsets, groups)
    group, patch, x = place[order], rows % patches, values[order]
    count = starts.diff()

    def total(amount: Tensor) -> Tensor:
        return amount.new_zeros(groups).index_add(0, group, amount)

    key = group * patches + patch  # ascending: groups, and patches within each
    degree = (start[1:] - start[:-1])[patch]
    entry = torch.repeat_interleave(torch.arange(len(x), device=x.device), degree)
    within = torch.arange(len(entry), device=x.device) - offsets_of(degree)[entry]
    edge = start[patch][entry] + within
    wanted = group[entry] * patches + near[edge]
    at = torch.searchsorted(key, wanted).clamp_max(max(0, len(key) - 1))
    joint = torch.where(key[at] == wanted, x[entry] * weight[edge] * x[at], 0)
    sums = x.new_zeros(groups).index_add(0, group[entry], joint)
    mean = total(x) / patches
    spread = total(x.square()) - patches * mean.square()
    i = patches / weights.whole * (sums - mean * total(x * reach[patch]) + mean.square() * weights.whole) / spread
    return torch.where((count >= min_active) & (spread / patches > min_variance), i, torch.nan)


class Moran(SumMetric):
    """Spatial coherence of each latent: the mean of Moran's I over the images on which it is evaluable.

    A latent is evaluable on an image with ``min_active`` active patches or more, a share of them up to ``max_share``,
    and a variance above ``min_variance``, and in aggregate on ``min_images`` such images. ``compute`` gives float64
    scalars over the latents evaluable in aggregate: ``moran`` (their mean, the M1 score), ``moran_median``,
    ``moran_q25`` and ``moran_q75``, ``moran_evaluable`` (their share of all latents), ``moran_null`` = -1 / (P - 1),
    the expectation without spatial order, and ``moran_z``, how many standard errors over latents the mean lies above
    it. NaN where no latent is evaluable. States are sums of I and I² and counts, [d_sae].
    """

    inputs = ("patch_codes",)
    images: Tensor
    total: Tensor
    squares: Tensor

    def __init__(
        self, d_sae: int, grid: tuple[int, int], contiguity: str = "queen", row_standardized: bool = False,
        min_active: int = 5, min_variance: float = 1e-8, min_images: int = 50, max_share: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weights, self.max_share = grid_weights(grid, contiguity, row_standardized), max_share
        self.d_sae, self.min_active, self.min_variance, self.min_images = d_sae, min_active, min_variance, min_images
        self.add_sum("images", d_sae, dtype=torch.long)
        self.add_sum("total", d_sae)
        self.add_sum("squares", d_sae)

    @torch.no_grad()
    def update(self, codes: SparseCodes) -> None:
        """Add the codes of whole images, P patch tokens each."""
        if codes.d_sae != self.d_sae:
            raise ValueError(f"Expected codes of {self.d_sae} latents; got {codes.d_sae}.")
        latents, _, i = morans_i(codes, self.weights, self.min_active, self.min_variance, self.max_share)
        latents, i = latents[~i.isnan()], i[~i.isnan()]
        self.images += torch.bincount(latents, minlength=self.d_sae)
        self.total.index_add_(0, latents, i)
        self.squares.index_add_(0, latents, i.square())

    def scores(self) -> Tensor:
        """Mean I of each latent [d_sae] float64; NaN where it is not evaluable in aggregate."""
        return torch.where(self.images >= self.min_images, self.total / self.images, torch.nan)

    def of_latents(self) -> dict[str, Tensor]:
        return {"moran": self.scores(), "moran_images": self.images}

    def shown(self, n: int, seed: int = 0) -> dict[str, Tensor]:
        """Latents to show of the distribution [ViSAEBench App. H], half of ``n`` each.

        ``high Moran`` are drawn by ``seed`` from its top 5 %, ``low Moran`` from its lowest; ``mean Moran`` are the
        ones nearest to its mean.
        """
        scores, n = self.scores().cpu(), -(-n // 2)
        known = (~scores.isnan()).nonzero().squeeze(1)
        order = known[scores[known].argsort(stable=True)]
        tail = min(len(order), max(n, -(-len(order) // 20)))
        drawn = torch.randperm(tail, generator=torch.Generator().manual_seed(seed))[:n]
        near = (scores[known] - scores[known].mean()).abs().argsort(stable=True)[:n]
        return {
            "high Moran": order[len(order) - tail :][drawn], "mean Moran": known[near],
            "low Moran": order[:tail][drawn],
        }  # fmt: skip

    def sure(self) -> dict[str, Score]:
        return {"moran": averaged("moran", self.scores().cpu(), unit="latents")}

    def compute(self) -> dict[str, Tensor]:
        scores = self.scores()
        known = scores[~scores.isnan()]
        null = torch.tensor(-1 / (len(self.weights.reach) - 1), dtype=torch.float64, device=scores.device)
        quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device=scores.device)
        q25, median, q75 = known.quantile(quartiles) if len(known) else quartiles * torch.nan
        error = known.std() / len(known) ** 0.5 if len(known) > 1 else null * torch.nan
        return {
            "moran": known.mean(), "moran_median": median, "moran_q25": q25, "moran_q75": q75,
            "moran_evaluable": torch.as_tensor(len(known) / self.d_sae, dtype=torch.float64),
            "moran_null": null, "moran_z": (known.mean() - null) / error,
        }  # fmt: skip


BLOCK = 1 << 20  # numbers held at once, so that they stay in the processor's cache


def channel_morans_i(features: Tensor, weights: Weights, min_variance: float = 1e-8) -> Tensor:
    """Moran's I [n, d_in] float64 of every channel on every image of ``features`` [n, P, d_in], any float type.

    NaN where the variance over the image's patches is at most ``min_variance``. All patches count, whatever their sign.
    The products are taken of centred values in float32, or float64 if the features are. ValueError when P is not the
    number of patches of the weights' grid.
    """
    patches = len(weights.reach)
    if features.ndim != 3 or features.shape[1] != patches:
        raise ValueError(f"Expected features [n, {patches}, d_in] of {patches} patches; got {list(features.shape)}.")
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    start, near, weight = (t.to(features.device) for t in weights[:3])
    found = torch.empty(len(features), features.shape[2], dtype=torch.float64, device=features.device)
    images = max(1, BLOCK // max(1, patches * features.shape[2]))
    for part, out in zip(features.split(images), found.split(images), strict=True):
        maps = part.transpose(0, 1).to(dtype).reshape(patches, -1)  # [P, n * d_in]
        maps = (maps - maps.mean(0)).contiguous()
        around = sparse_decode(near, weight.to(dtype), start, maps)
        spread = maps.square().sum(0).double()
        i = patches / weights.whole * (maps * around).sum(0).double() / spread
        out.copy_(torch.where(spread / patches > min_variance, i, torch.nan).view_as(out))
    return found


class ChannelMoran(Moran):
    """The mean of Moran's I of each channel over the images on which it varies: the counterpart of ``Moran``.

    Each raw channel is a map over the patches. Where ``Moran`` asks for active patches, this asks only for a variance
    above ``min_variance``. ``compute`` gives the same scalars over channels, named ``channel_moran`` (their mean),
    ``channel_moran_median``, … and ``channel_moran_z``.
    """

    def __init__(
        self, d_in: int, grid: tuple[int, int], contiguity: str = "queen", row_standardized: bool = False,
        min_variance: float = 1e-8, min_images: int = 50,
    ) -> None:  # fmt: skip
        super().__init__(d_in, grid, contiguity, row_standardized, 0, min_variance, min_images)

    @torch.no_grad()
    def update(self, features: Tensor) -> None:  # type: ignore[override]
        """Add the features [n, P, d_in] of n images, patches in the grid's order."""
        if features.shape[-1] != self.d_sae:
            raise ValueError(f"Expected features of {self.d_sae} channels; got {features.shape[-1]}.")
        i = channel_morans_i(features, self.weights, self.min_variance)
        self.images += (~i.isnan()).sum(0)
        self.total += i.nansum(0)
        self.squares += i.square().nansum(0)

    def sure(self) -> dict[str, Score]:
        return {"channel_moran": averaged("channel_moran", self.scores().cpu(), unit="channels")}

    def compute(self) -> dict[str, Tensor]:
        return {f"channel_{name}": value for name, value in super().compute().items()}


def moran(run: ScoredRun, options: Options) -> list[Score]:
    """M1, with the mean of Moran's I of each latent."""
    if not run.store().spatial:
        return []
    run.summary()
    metric = run.metric("moran", Moran)
    return named(metric.compute(), metric.sure())


def released(run: ScoredRun, options: Options) -> list[Score]:
    """M1 as the released package counts it: of each latent the first images on which it is evaluable, of some latents.

    A latent takes part in no further ``group`` of images, in the store's order, once it has its ``images``; of the
    evaluable latents ``latents`` are drawn by ``seed``.
    """
    store = run.store()
    if not store.spatial:
        return []
    weights = grid_weights(store.grid, options["contiguity"], options["row_standardized"])
    limits = (options["min_active"], options["min_spread"] / len(weights.reach), options["max_share"])
    sums, now = np.zeros((2, run.sae.d_sae)), np.zeros((2, run.sae.d_sae))  # counts and sums, and those of a group
    group = first = 0
    for read in run.batches("Moran's I of the first images"):
        with torch.no_grad():
            codes = run.sae.encode(read[:, store.prefix :].flatten(0, 1))
        latents, images, i = (found.numpy() for found in morans_i(codes, weights, *limits))
        groups, first = (first + images) // options["group"], first + len(read)
        for each in range(group, (first - 1) // options["group"] + 1):
            if each > group:
                group, sums, now = each, sums + now * (sums[0] < options["images"]), np.zeros_like(now)
            here = (groups == each) & ~np.isnan(i)
            now += np.stack([np.bincount(latents[here], w, now.shape[1]) for w in (None, i[here])])
    counts, totals = sums + now * (sums[0] < options["images"])
    known = np.flatnonzero(counts >= options["min_images"])
    share = len(known) / run.sae.d_sae
    if len(known) > options["latents"]:
        known = np.random.RandomState(options["seed"]).choice(known, options["latents"], replace=False)
    scores = totals[known] / counts[known]
    median = float(np.median(scores)) if len(known) else float("nan")
    found = named({"moran_median": median, "moran_evaluable": share, "moran_scored": len(known)})
    return [averaged("moran", scores, unit="latents"), *found]


def raw_moran(run: ScoredRun, options: Options) -> list[Score]:
    """Moran's I of the backbone's own channels, once for all of its SAEs."""

    def make() -> list[Score]:
        store = run.store()
        metric = of_one_rank(ChannelMoran(store.d_in, store.grid, **options))
        for read in run.batches("Moran's I of the features"):
            metric.update(run.frame.normalize(read[:, store.prefix :]))
        return named(metric.compute(), metric.sure())

    return run.shared("raw_moran", make)


def _streams(about: Streamed, options: Options) -> dict[str, SumMetric]:
    return {"moran": Moran(about.sae.d_sae, about.store.grid, **options)} if about.store.spatial else {}


TABLE = "M1: Moran's I"
THEIRS = "the features' own channels"
PART = register(Part(
    "moran", moran, _streams, needs=("core",), applies=on_patches, leaves=("moran",), title=TABLE,
    about="Of each evaluable latent the mean over images; quartiles are those of latents.",
    undefined="no latent has {min_images} images with {min_active} active patches and some variance",
    otherwise={"compute": released, "streams": nothing, "needs": (), "leaves": ()},
    columns=(
        Column("M1 Moran's I", "moran", better=True, headline="M1", protocol=RELEASED, about="mean Moran's I of 500 of "
               "the evaluable latents, each on its first images"),
        Column("M1 Moran's I", "moran", better=True, headline="M1", about="mean Moran's I of the evaluable latents: "
               "how connected the regions are on which they fire"),
        Column("mean", "moran", better=True), Column("lower quartile", "moran_q25"), Column("median", "moran_median"),
        Column("upper quartile", "moran_q75"), Column("evaluable", "moran_evaluable", form=".1%"),
        Column("null", "moran_null", form=".4f", about="-1 / (P - 1), the expectation without spatial order"),
        Column("z", "moran_z", form=".1f", about="standard errors between the mean and the null"),
    ),
))  # fmt: skip
RAW = register(Part(
    "raw_moran", raw_moran, applies=on_patches, title=TABLE, undefined="no channel varies on {min_images} images",
    columns=(
        Column("mean", "channel_moran", over=THEIRS), Column("median", "channel_moran_median", over=THEIRS),
        Column("z", "channel_moran_z", form=".1f", over=THEIRS),
        Column("M1 / theirs", "moran", per="channel_moran", over=THEIRS),
    ),
))  # fmt: skip
