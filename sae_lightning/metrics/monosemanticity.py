"""Monosemanticity: how alike the images are on which a latent is strongest, M5 of ViSAEBench.

Unlike ``MonoScore``, which weighs all pairs of images, it looks at each latent's top images alone, and subtracts what
random images would have.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PART = 1 << 22  # numbers of embeddings gathered at once


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
    latents = max(1, PART // max(1, top * embeddings.shape[1]))
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
