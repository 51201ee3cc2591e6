"""How monosemantic latents are beside the features' own channels: the MS of Pach et al., with a judge of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from scipy import sparse
from torch import Tensor

from sae_lightning.metrics.base import Score, of_one_rank
from sae_lightning.metrics.intervals import averaged
from sae_lightning.metrics.monoscore import MSScore
from sae_lightning.metrics.part import Column, Options, Part, ScoredRun, register
from sae_lightning.saes.codes import SparseCodes
from sae_lightning.saes.matryoshka import prefix_ends
from sae_lightning.saes.sae import SAE

IMAGES = 4096  # at once


def ms_scores(activations: np.ndarray | sparse.csr_matrix, embeddings: Tensor) -> Tensor:
    """MS [M] float64 of activations [n, M] of any sign, dense or compressed; NaN for a column that has none."""
    n, width = activations.shape
    metric = of_one_rank(MSScore(width, embeddings.shape[1]))
    for start in range(0, n, IMAGES):
        some = activations[start : start + IMAGES]
        if isinstance(some, np.ndarray):
            given: Tensor | SparseCodes = torch.from_numpy(some)
        else:
            latents, values, offsets = (torch.from_numpy(np.array(p)) for p in (some.indices, some.data, some.indptr))
            given = SparseCodes(latents.long(), values, offsets.long(), width)
        metric.update(given, embeddings[start : start + IMAGES])
    return metric.scores()


def above_by_rank(scores: Tensor, raw: Tensor) -> float:
    """The share of the ranks of ``raw`` [m] at which ``scores`` [n] lie above, both sorted; NaN where one is empty.

    NaNs in either are left out. Where they are not as many, ranks are shares: the middle of each of raw's is looked up.
    """
    ours, theirs = (np.sort(s[~s.isnan()].cpu().numpy()) for s in (scores, raw))
    if not len(ours) or not len(theirs):
        return float("nan")
    place = (np.arange(len(theirs)) + 0.5) / len(theirs) * len(ours)
    return float((ours[place.astype(int)] > theirs).mean())


def prefixes(sae: SAE) -> Iterable[tuple[str, slice]]:
    """The latents that each fixed prefix of a Matryoshka SAE adds to the one before; none of other SAEs."""
    settings = sae.settings()
    fractions: Any = () if settings.get("sampled") else settings.get("fractions", ())
    ends = prefix_ends(sae.d_sae, tuple(fractions)) if fractions else []
    return [(f"prefix={f:g}", slice(a, b)) for f, a, b in zip(fractions, [0, *ends], ends, strict=False)]


def ms(run: ScoredRun, options: Options) -> list[Score]:
    """The best latent's MS and the mean of those that have one, of latents and of channels, and how they compare."""
    images, embeddings = run.images(), run.shared("ms embeddings", lambda: run.embeddings("ms_score"))
    scores = ms_scores(images.codes, embeddings)
    raw = run.shared("ms of channels", lambda: ms_scores(images.raw, embeddings))
    run.write_latents({"ms": scores})
    peak, raw_peak = (float(np.nanmax(s)) if not s.isnan().all() else np.nan for s in (scores, raw))
    return [
        Score("ms_peak", peak), averaged("ms_mean", scores, unit="latents"),
        Score("ms_peak_raw", raw_peak), averaged("ms_mean_raw", raw, unit="channels"),
        Score("ms_gain", peak - raw_peak), Score("ms_above_raw", above_by_rank(scores, raw)),
        averaged("ms_scored_share", ~scores.isnan(), unit="latents"),
        *(averaged("ms_mean", scores[span], setting, unit="latents") for setting, span in prefixes(run.sae)),
    ]  # fmt: skip


def encoder(config: DictConfig, options: Options) -> dict[str, Any]:
    """The judge, of the size of the run's own encoder, or a store."""
    if options["store"] is not None:
        return {"store": options["store"]}
    judge = options["judge"]
    return {"backbone": judge and {**judge, "size": config.backbone.size}, "features": options["features"]}


RAW = "the features' own channels"
PART = register(Part(
    "ms_score", ms, needs=("images",), leaves=("ms",), encoder=encoder, apart=("judge", "features", "store"),
    title="MS: monosemanticity score",
    about="The likeness, to a judge, of pairs of images, weighted by how strongly both activate a latent; latents "
    "without a score are left out. Channels count with their sign, from their least to their largest value.",
    undefined="no latent, or no channel, lies above its least value on two images",
    columns=(
        Column("peak", "ms_peak", better=True), Column("mean", "ms_mean", better=True),
        Column("peak", "ms_peak_raw", over=RAW), Column("mean", "ms_mean_raw", over=RAW),
        Column("gain", "ms_gain", better=True, about="the best latent's above the best channel's"),
        Column("above", "ms_above_raw", better=True, form=".1%",
               about="share of ranks at which the latent's lies above the channel's"),
        Column("R²", "r2", better=True), Column("scored", "ms_scored_share", form=".1%"),
        Column("to {prefix}", "ms_mean", "prefix={prefix}", over="mean by Matryoshka prefix",
               about="of the latents that this share of the dictionary adds to the one before"),
    ),
))  # fmt: skip
