"""Whether names mean anything: chance, held-out pictures, and the labels' own names beside those from text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import cohen_kappa_score
from torch import Tensor

from sae_lightning.apps.intervals import mean_interval, share_interval
from sae_lightning.apps.naming.activation import Fits
from sae_lightning.apps.naming.match import CONDITIONS, Match, of_latents


@dataclass(frozen=True)
class Measured:
    """A mean with its 95 % interval, what chance gives, and over how many latents."""

    value: float
    interval: tuple[float, float]
    chance: float
    latents: int


# --- chance --------------------------------------------------------------------------------------
def like(vectors: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """``n`` random unit vectors of the mean and covariance of ``vectors`` [m, d]."""
    mean = vectors.double().mean(0)
    values, axes = torch.linalg.eigh((vectors.double() - mean).T.cov(correction=0))
    drawn = torch.randn(n, len(values), generator=generator, dtype=torch.float64) * values.clamp_min(0).sqrt()
    found = mean + drawn @ axes.T
    return (found / found.norm(dim=1, keepdim=True).clamp_min(1e-12)).float()


def chance_counts(
    drawn: Callable[[torch.Generator], Match], draws: int, threshold: float, ratio: float, seed: int
) -> dict[str, dict[str, float]]:
    """How many latents meet each of ``CONDITIONS`` in random matches, ``draws`` times ``drawn`` by a generator.

    Of each condition ``mean``, ``low`` and ``high`` (the middle 95 % of the draws).
    """
    generator = torch.Generator().manual_seed(seed)
    counts = np.array([
        [passing.sum() for passing in of_latents(drawn(generator), threshold, ratio).values()] for _ in range(draws)
    ])  # fmt: skip
    low, high = np.quantile(counts, [0.025, 0.975], axis=0)
    columns = zip(CONDITIONS, counts.mean(0).tolist(), low.tolist(), high.tolist(), strict=True)
    return {name: {"mean": mean, "low": lo, "high": hi} for name, mean, lo, hi in columns}


# --- held-out pictures ---------------------------------------------------------------------------


def precision(top: np.ndarray, named: np.ndarray, labels: np.ndarray, seed: int) -> Measured | None:
    """Share of the ``top`` images [m, n] that are of the class that the name says (``named`` [m]); None without any.

    Chance: the same with the names permuted among these latents, its mean over all permutations.
    """
    keep = (named >= 0) & (top >= 0).any(1)
    if not keep.any():
        return None
    top, named = top[keep], named[keep]
    of = np.where(top >= 0, labels[top], -1)
    hits = (of[:, :, None] == named[None, None, :]).sum(1) / (top >= 0).sum(1)[:, None]  # [latents, names]
    own = np.diagonal(hits)
    return Measured(float(own.mean()), mean_interval(own, seed), float(hits.mean()), len(own))


def standing(top: np.ndarray, names: np.ndarray, fits: Fits, seed: int) -> Measured | None:
    """Share of the other words that fit the ``top`` images [m, n] worse than their latent's name (``names`` [m]).

    1 where the name fits best of all, 0.5 for a word at random; ties count half. Chance: the names permuted among
    these latents, its mean over all permutations. None without any images.
    """
    keep = (top >= 0).any(1)
    if not keep.any():
        return None
    own, others, names = [], [], names[keep]
    for latent, images in enumerate(top[keep]):
        words = (fits.texts @ fits.images[images[images >= 0]].mean(0)).numpy()
        ordered, wanted = np.sort(words), words[names]
        worse = (np.searchsorted(ordered, wanted, "left") + np.searchsorted(ordered, wanted, "right") - 1) / 2
        own.append(worse[latent] / (len(words) - 1))
        others.append(worse.mean() / (len(words) - 1))
    return Measured(float(np.mean(own)), mean_interval(np.array(own), seed), float(np.mean(others)), len(own))


# --- names of both kinds -------------------------------------------------------------------------
def class_in(name: str, classes: Sequence[str]) -> int:
    """Index of the class that ``name`` contains as whole words, the longest one; -1 where there is none or several.

    Of a class with synonyms (``tench, Tinca tinca``) the first counts.
    """
    called = {tuple(c.partition(", ")[0].lower().replace("_", " ").split()): i for i, c in enumerate(classes)}
    words = tuple(name.lower().replace("_", " ").replace(",", " ").split())
    longest = min(len(words), max(map(len, called), default=0))
    for length in range(longest, 0, -1):
        found = {called.get(words[i : i + length], -1) for i in range(len(words) - length + 1)} - {-1}
        if found:
            return found.pop() if len(found) == 1 else -1
    return -1


@dataclass(frozen=True)
class Agreement:
    """``share`` of latents whose text names the class of their label, and Cohen's ``kappa``, with 95 % intervals.

    κ is None where both name one class only; its interval is of a bootstrap over latents.
    """

    latents: int
    share: float
    share_interval: tuple[float, float]
    chance: float
    kappa: float | None
    kappa_interval: tuple[float, float] | None


def agreement(text: np.ndarray, label: np.ndarray, seed: int) -> Agreement | None:
    """How far the classes in text names and label names [n] (-1: none) agree, where both are; None if they never are.

    Chance is the share with the names permuted, the mean over all permutations.
    """
    both = (text >= 0) & (label >= 0)
    if not both.any():
        return None
    text, label = text[both], label[both]
    same, n = int((text == label).sum()), len(text)
    chance = float((text[:, None] == label[None, :]).mean())
    rng = np.random.default_rng(seed)
    drawn = [kappa(text[i], label[i]) for i in rng.integers(n, size=(500, n))]
    there = [value for value in drawn if value is not None]
    found = kappa(text, label)
    interval = None if found is None or not there else tuple(np.quantile(there, [0.025, 0.975]).tolist())
    return Agreement(n, same / n, share_interval(same, n), chance, found, interval)


def kappa(a: np.ndarray, b: np.ndarray) -> float | None:
    """Cohen's κ of two namings [n]; None where both give one class throughout."""
    return None if len(np.union1d(a, b)) < 2 else float(cohen_kappa_score(a, b))
