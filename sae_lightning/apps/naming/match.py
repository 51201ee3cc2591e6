"""Which concept each latent is closest to, which latent each concept, and who passes the thresholds [MSAE App. A]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csc_matrix, csr_matrix
from sklearn.metrics import cohen_kappa_score
from torch import Tensor

from sae_lightning.apps.statistics import mean_interval, share_interval

ENTRIES = 1 << 24  # similarities held at once

CONDITIONS = ("above", "best", "above_best", "ratio", "all")  # MSAE Table 3

COLUMNS = {name: "ratio_above" if name == "ratio" else name for name in CONDITIONS}  # of the table

PAPER = {  # Table 3's counts at expansions 8, 16 and 32, of 37,445 concepts and CLIP ViT-L/14
    "Top K (k = 32)": ((4081, 4719, 5027), (2755, 3415, 3827), (1021, 1259, 1411), (999, 857, 858), (216, 197, 203)),
    "Matryoshka (RW)": ((1136, 1109, 1038), (1628, 2213, 2541), (237, 257, 259), (1429, 1135, 1059), (140, 132, 121)),
    "Matryoshka (UW)": ((907, 894, 748), (1517, 1908, 2396), (195, 191, 167), (1254, 1169, 1069), (125, 128, 98)),
}

Score = Callable[[slice], Tensor]  # of latents [b] their similarity to all concepts [b, V]


@dataclass(frozen=True)
class Nearest:
    """Of each of n things the nearest of others: ``index`` and ``score`` [n], and the same of the ``second``."""

    index: np.ndarray
    score: np.ndarray
    second_index: np.ndarray
    second: np.ndarray

    @property
    def ratio(self) -> np.ndarray:
        """First over second similarity [n]; infinite where only the first is positive, 0 where none is."""
        positive = self.second > 0
        ratio = np.divide(self.score, self.second, out=np.full(len(self.score), np.inf), where=positive)
        return np.where(self.score > 0, ratio, 0.0)


@dataclass(frozen=True)
class Match:
    """``latents``: of n latents the nearest concepts; ``concepts``: of V concepts the nearest latents."""

    latents: Nearest
    concepts: Nearest

    @property
    def best(self) -> np.ndarray:
        """Whether no other latent is nearer to a latent's concept [n] bool, so that no two latents share a name."""
        return self.concepts.index[self.latents.index] == np.arange(len(self.latents.index))


def match(score: Score, n_latents: int, n_concepts: int, entries: int = ENTRIES) -> Match:
    """The two nearest both ways, a block of latents at a time: O(n + V) memory beside ``entries`` similarities.

    Of equals the first. ValueError with fewer than two latents or concepts.
    """
    if min(n_latents, n_concepts) < 2:
        raise ValueError(
            f"Naming needs two latents and two words to compare; there are {n_latents} and {n_concepts}. Do latents "
            "fire at all (see the run's dead share)?"
        )
    step = max(1, entries // n_concepts)
    of_latents = []
    values, indices = torch.zeros(0, n_concepts), torch.zeros(0, n_concepts, dtype=torch.long)
    for start in range(0, n_latents, step):
        block = score(slice(start, min(start + step, n_latents)))
        of_latents.append(_first_two(block, 1))
        top, where = _first_two(block, 0)
        values, indices = torch.cat([values, top]), torch.cat([indices, where + start])
        values, kept = _first_two(values, 0)
        indices = indices.gather(0, kept)
    scores, concepts = (torch.cat(part) for part in zip(*of_latents, strict=True))
    return Match(_nearest(concepts.T, scores.T), _nearest(indices, values))


def _first_two(scores: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The two largest along ``dim`` and where they are, of equals the first; one if there is one."""
    first, at = scores.max(dim, keepdim=True)  # torch's max gives the first of equals on the CPU
    if scores.shape[dim] == 1:
        return first, at
    second, then = scores.scatter(dim, at, -torch.inf).max(dim, keepdim=True)
    return torch.cat([first, second], dim), torch.cat([at, then], dim)


def _nearest(indices: Tensor, scores: Tensor) -> Nearest:
    (first, second), (score, runner_up) = indices.numpy(), scores.double().numpy()
    return Nearest(first, score, second, runner_up)


def cosines(directions: Tensor, texts: Tensor) -> Score:
    """Cosine of the decoder's rows [n, d] and placed texts [V, d] (unit vectors)."""
    rows = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return lambda block: rows[block] @ texts.T


def of_latents(found: Match, threshold: float, ratio: float) -> dict[str, np.ndarray]:
    """Which latents [n] bool meet each of ``CONDITIONS``, each latent with the concept that is nearest to it.

    ``above``: similarity beyond ``threshold``; ``ratio``: beyond ``ratio`` times that of the second concept; ``best``:
    no other latent is nearer to the concept; ``above_best`` both of these, ``all`` every one.
    """
    above, best, unique = found.latents.score > threshold, found.best, found.latents.ratio > ratio
    return {"above": above, "best": best, "above_best": above & best, "ratio": unique, "all": above & best & unique}


def of_concepts(found: Match, threshold: float, ratio: float) -> dict[str, int]:
    """The counts of ``CONDITIONS``, each concept with the latent that is nearest to it.

    ``above`` counts concepts; ``best`` latents that are nearest to any, each keeping the most similar of them;
    ``above_best`` those where that one is beyond ``threshold``; ``ratio`` concepts whose nearest latent is beyond
    ``ratio`` times as similar as their second; ``all`` latents whose concept meets every condition.
    """
    near = found.concepts
    above, unique = near.score > threshold, near.ratio > ratio
    order = np.argsort(-near.score, kind="stable")
    reached, first = np.unique(near.index[order], return_index=True)
    kept = order[first]  # of each reached latent its most similar concept
    return {
        "above": int(above.sum()), "best": len(reached), "above_best": int(above[kept].sum()),
        "ratio": int(unique.sum()), "all": int((above & unique)[kept].sum()),
    }  # fmt: skip


def named_at(found: Match, thresholds: Sequence[float], ratios: Sequence[float], best: bool = False) -> list[list[int]]:
    """How many latents are beyond each similarity (rows) and each ratio (columns); with ``best`` the best ones only."""
    keep = found.best if best else np.ones(len(found.latents.index), dtype=bool)
    similar = [keep & (found.latents.score > t) for t in thresholds]
    unique = [found.latents.ratio > r for r in ratios]
    return [[int((s & u).sum()) for u in unique] for s in similar]


class Fits(NamedTuple):
    """How well word v fits image i: ``images[i] · texts[v]``, of mean 0 and deviation 1 over the images.

    ``images`` [n, d], ``texts`` [V, d]; the n · V products are never held at once.
    """

    images: Tensor
    texts: Tensor


def fit(images: Tensor, texts: Tensor) -> Fits:
    """Cosines of image embeddings [n, d], centred at their mean, and placed texts [V, d], made scores over the images.

    A word that fits all images alike fits each by 0.
    """
    x = images.float() - images.float().mean(0)
    x = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
    x = x - x.mean(0)
    t = texts / texts.norm(dim=1, keepdim=True).clamp_min(1e-12)
    deviation = ((t @ (x.T @ x / len(x))) * t).sum(1, keepdim=True).clamp_min(0).sqrt()
    return Fits(x, torch.where(deviation > 1e-6, t / deviation, 0.0))


def correlations(codes: csr_matrix | csc_matrix, fits: Fits) -> Score:
    """Pearson correlation over images of codes [n, d_sae] and ``fits``.

    ρ = mean(z · f) / std(z), since f has mean 0 and deviation 1; 0 for a latent that never changes. zᵀ(x tᵀ) is
    computed as (zᵀx)tᵀ, so memory is O(d_sae · d) and the codes stay sparse. ValueError when images differ in number.
    """
    n = codes.shape[0]
    if n != len(fits.images):
        raise ValueError(f"Expected the codes of {len(fits.images)} images; got those of {n}.")
    z = codes.tocsc().astype(np.float64)
    mean, square = (np.asarray(each.mean(0)).ravel() for each in (z, z.multiply(z)))
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    scale = np.divide(1.0, n * deviation, out=np.zeros_like(deviation), where=deviation > 1e-8)
    together = torch.from_numpy((z.T @ fits.images.double().numpy()) * scale[:, None]).float()
    return lambda block: together[block] @ fits.texts.T


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
