"""Monosemanticity: how alike the images are on which a latent is strongest, M5 of ViSAEBench.

Unlike ``MonoScore``, which weighs all pairs of images, it looks at each latent's top images alone, and subtracts what
random images would have.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from sae_lightning.metrics.base import Score, SumMetric
from sae_lightning.metrics.intervals import averaged, named
from sae_lightning.metrics.monoscore import MonoScore
from sae_lightning.metrics.part import Column, Options, Part, ScoredRun, Streamed, register
from sae_lightning.metrics.protocols import RELEASED

BLOCK = 1 << 22  # numbers of embeddings gathered at once


class Monosemanticity(NamedTuple):
    """For m latents, [m] float64 each, NaN where undefined.

    ``score`` is the weighted mean cosine MS of the pairs of top images, ``plain`` the mean over all pairs alike,
    ``within`` and ``between`` the weighted means over the pairs of one class and of two, ``within_mass`` the former's
    share ρ of the pair weights: score = ρ · within + (1 - ρ) · between. The last three are NaN without labels.
    """

    score: Tensor
    plain: Tensor
    within: Tensor
    between: Tensor
    within_mass: Tensor


def choose_live(peaks: Tensor, n: int = 2048, seed: int = 42) -> Tensor:
    """The latents to score: those whose largest activation ``peaks`` [d_sae] is positive, or ``n`` of them drawn.

    Uniformly without replacement, by ``seed``; ascending, int64 [min(n, live)].
    """
    live = (peaks > 0).nonzero().squeeze(1).cpu()
    if len(live) > n:
        live = live[torch.randperm(len(live), generator=torch.Generator().manual_seed(seed))[:n]].sort().values
    return live.to(peaks.device)


def unit_rows(embeddings: Tensor) -> Tensor:
    """Norms [n] float64 of ``embeddings`` [n, d]; ValueError that names one without a direction."""
    parts = [torch.linalg.vector_norm(part.double(), dim=1) for part in embeddings.split(4096)]
    norms = torch.cat(parts) if parts else embeddings.new_zeros(0, dtype=torch.float64)
    bad = ~((norms > 0) & norms.isfinite())
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"The embedding of image {first} is zero or not finite, so that it has no cosine ({int(bad.sum())} of "
            f"{len(bad)} are). Extract the embeddings again, or leave these images out."
        )
    return norms


@torch.no_grad()
def monosemanticity(
    images: Tensor, strength: Tensor, least: Tensor, embeddings: Tensor, labels: Tensor | None = None
) -> Monosemanticity:
    """MS_j = Σ_{u<v} w_u w_v cos(e_u, e_v) / Σ_{u<v} w_u w_v over latent j's top images [ViSAEBench App. K].

    ``images`` [m, N] int64 lists them (-1 where a latent fires on fewer than N: then it is scored on those), their
    activations are ``strength`` [m, N], ``least`` [m] is each latent's smallest activation over all images (0 unless
    it fires on every one). ``embeddings`` [n, d] of any float type are those of another encoder, ``labels`` [n] int64.

    The paper's weights w = (a - least) / (most - least) are the activations above the least one: the scale cancels.
    MS is NaN where no two images lie above it. O(m N d) memory in parts, sums in float64. ValueError for shapes that do
    not fit and for a zero embedding.
    """
    m, top = images.shape
    if strength.shape != (m, top) or least.shape != (m,) or (labels is not None and len(labels) != len(embeddings)):
        raise ValueError(
            f"Expected strength {[m, top]}, least {[m]} and one label an embedding; got {list(strength.shape)}, "
            f"{list(least.shape)}, {len(embeddings)} embeddings and {'no' if labels is None else len(labels)} labels."
        )
    norms = unit_rows(embeddings)
    latents = max(1, BLOCK // max(1, top * embeddings.shape[1]))
    found = torch.full((len(Monosemanticity._fields), m), torch.nan, dtype=torch.float64, device=embeddings.device)
    for start in range(0, m, latents):
        at = slice(start, start + latents)
        _score(images[at], strength[at], least[at], embeddings, norms, labels, found[:, at])
    return Monosemanticity(*found)


def _score(
    images: Tensor, strength: Tensor, least: Tensor, embeddings: Tensor, norms: Tensor, labels: Tensor | None,
    out: Tensor,
) -> None:  # fmt: skip
    """Fill ``out`` [5, m] for m latents at once, whose cosines [m, N, N] are held."""
    there, index = images >= 0, images.clamp_min(0)
    unit = embeddings[index].double() / norms[index][..., None]
    cosines = unit @ unit.mT
    w = torch.where(there, strength.double() - least.double()[:, None], 0).clamp_min(0)
    w = w / w.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    once = torch.ones_like(cosines[0]).triu(1)  # u < v
    pairs = w[:, :, None] * w[:, None, :] * once
    out[0] = _mean(pairs, cosines)
    out[1] = _mean((there[:, :, None] & there[:, None, :]) * once, cosines)
    if labels is not None:
        same = labels[index][:, :, None] == labels[index][:, None, :]
        out[2], out[3] = _mean(pairs * same, cosines), _mean(pairs * ~same, cosines)
        out[4] = _mean(pairs, same.double())


def _mean(weights: Tensor, values: Tensor) -> Tensor:
    """Weighted means [m] of ``values`` [m, N, N]; NaN where all weights are zero."""
    whole = weights.sum((1, 2))
    return torch.where(whole > 0, (weights * values).sum((1, 2)) / whole, torch.nan)


@torch.no_grad()
def baseline(embeddings: Tensor, groups: int = 1000, size: int = 16, seed: int = 42) -> float:
    """What random images have: the mean pairwise cosine of groups of ``size`` images of ``embeddings`` [n, d].

    Each group is drawn without repetition (all images where n is less than ``size``), and its pairs count alike.
    ValueError for fewer than two images and for a zero embedding.
    """
    size = min(size, len(embeddings))
    if size < 2:
        raise ValueError(f"Pairs need two images or more; got groups of {size} from {len(embeddings)} embeddings.")
    draw = np.random.default_rng(seed)
    images = np.stack([draw.choice(len(embeddings), size, replace=False) for _ in range(groups)])
    chosen = torch.from_numpy(images).to(embeddings.device)
    alike = torch.ones_like(chosen, dtype=torch.float64)
    return float(monosemanticity(chosen, alike, alike.new_zeros(groups), embeddings).plain.mean())


def summarize(found: Monosemanticity, baseline: float) -> dict[str, float]:
    """Means over the latents that have a score, raw and as (raw - baseline) / (1 - baseline) [ViSAEBench eq. 5].

    ``monosemanticity`` is M5 and ``monosemanticity_plain`` the same without weights, each also as ``…_raw``;
    ``…_within``, ``…_between`` and ``…_within_mass`` are means over the scored latents that have one, and
    ``monosemanticity_scored`` counts the scored. NaN where there is none.
    """
    scored = ~found.score.isnan()
    raw, plain, within, between, mass = (float(values[scored].nanmean()) for values in found)
    return {
        "monosemanticity": (raw - baseline) / (1 - baseline), "monosemanticity_raw": raw,
        "monosemanticity_plain": (plain - baseline) / (1 - baseline), "monosemanticity_plain_raw": plain,
        "monosemanticity_baseline": baseline, "monosemanticity_within": within, "monosemanticity_between": between,
        "monosemanticity_within_mass": mass, "monosemanticity_scored": float(scored.sum()),
    }  # fmt: skip


def scores(run: ScoredRun, options: Options) -> list[Score]:
    """M5, with the score of each latent."""
    embeddings = run.shared("embeddings", lambda: run.embeddings("monosemanticity"))
    floor = run.shared(
        f"floor {options}", lambda: baseline(embeddings, options["groups"], options["images"], options["seed"])
    )
    top, store = run.top(options["images"]), run.store()
    latents = choose_live(top.values[:, 0], options["latents"], options["seed"])
    least = run.metric("mono", MonoScore).minimum().cpu()[latents]
    labels = store.labels if run.labelled else None
    found = monosemanticity(top.images[latents], top.values[latents], least, embeddings, labels)
    unknown = torch.full((run.sae.d_sae,), torch.nan, dtype=torch.float64)
    run.write_latents({
        "monosemanticity": unknown.index_put((latents,), found.score),
        "monosemanticity_within_mass": unknown.index_put((latents,), found.within_mass),
    })  # fmt: skip
    each = {"": found.score, "_plain": found.plain[~found.score.isnan()]}
    sure = {f"monosemanticity{kind}": averaged("", (values.cpu() - floor) / (1 - floor), unit="latents")
            for kind, values in each.items()}  # fmt: skip
    return named(summarize(found, floor), sure)


def released(run: ScoredRun, options: Options) -> list[Score]:
    """M5 as the released package has it: the mean cosine itself, of latents drawn by its own generator."""
    embeddings = run.shared(f"embeddings {RELEASED}", lambda: run.embeddings(f"monosemanticity@{RELEASED}"))
    top = run.top(options["images"])
    live = np.flatnonzero((top.values[:, 0] > 0).numpy())
    if len(live) > options["latents"]:
        live = np.random.RandomState(options["seed"]).choice(live, options["latents"], replace=False)
    latents = torch.from_numpy(live)
    least = run.metric("mono", MonoScore).minimum().cpu()[latents]
    score = monosemanticity(top.images[latents], top.values[latents], least, embeddings).score
    known = score[~score.isnan()].cpu().numpy()
    median = float(np.median(known)) if len(known) else float("nan")
    return [averaged("monosemanticity", known, unit="latents"), Score("monosemanticity_median", median),
            Score("monosemanticity_scored", len(known))]  # fmt: skip


def encoder(config: DictConfig, options: Options) -> dict[str, Any]:
    """The similarity encoder of a run's backbone [ViSAEBench Table 5]; ValueError for one that is not given."""
    if options["store"] is not None:
        return {"store": options["store"]}
    judges, name = options["judges"], options["pairing"].get(config.backbone.name, options["other"])
    if name not in judges:
        raise ValueError(
            f"metrics.monosemanticity names {name} as the judge of {config.backbone.name}, but not that encoder; "
            f"add +backbone@metrics.monosemanticity.judges.{name}={name}."
        )
    chosen = judges[name]
    return {"backbone": chosen and {**chosen, "size": config.backbone.size}, "features": options["features"]}


def _streams(about: Streamed, options: Options) -> dict[str, SumMetric]:
    return {"mono": MonoScore(about.sae.d_sae, about.width)}


PART = register(Part(
    "monosemanticity", scores, _streams, leaves=("monosemanticity",), encoder=encoder,
    apart=("judges", "pairing", "other", "features", "store"), title="M5: monosemanticity",
    about="Mean cosine of pairs of a latent's top images to another encoder, weighted by their activations; M5 counts "
    "from that of random images.",
    undefined="no latent has two images to compare, or the images have no classes",
    otherwise={"compute": released, "leaves": ()},
    columns=(
        Column("M5 monosemanticity", "monosemanticity", better=True, headline="M5", protocol=RELEASED, about="mean "
               "cosine of a latent's top images to another encoder's patch tokens"),
        Column("M5 monosemanticity", "monosemanticity", better=True, headline="M5", about="likeness of a latent's top "
               "images to another encoder: 0 as random images, 1 identical"),
        Column("M5", "monosemanticity", better=True), Column("cosine", "monosemanticity_raw"),
        Column("of random images", "monosemanticity_baseline"),
        Column("within a class", "monosemanticity_within", over="cosine of pairs"),
        Column("between classes", "monosemanticity_between", over="cosine of pairs"),
        Column("weight within", "monosemanticity_within_mass", form=".1%", about="share of the pairs' weight"),
        Column("M5", "monosemanticity_plain", over="all pairs alike"),
        Column("cosine", "monosemanticity_plain_raw", over="all pairs alike"),
        Column("latents", "monosemanticity_scored", form=",.0f"),
    ),
))  # fmt: skip
