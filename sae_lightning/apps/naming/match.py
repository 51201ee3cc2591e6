"""Which concept each latent is closest to, which latent each concept, and who passes the thresholds [MSAE App. A]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
