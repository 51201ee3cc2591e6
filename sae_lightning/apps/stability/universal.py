"""Universal latents: tuples of one latent a run, from different backbones, that all fire on the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import ceil
from typing import Any

import numpy as np
import pandas as pd

from sae_lightning.apps.stability.activations import Activations, View, correlation, paired_correlation

Correlations = Mapping[tuple[int, int], np.ndarray]  # of runs a and b, both ways round, [latents of a, latents of b]
ROUNDS = 20  # of improving a tuple, which settles in a handful


def sets_of(views: Sequence[View]) -> list[list[View]]:
    """Runs of different backbones that are alike but for them, one of each, the first given; the smallest first.

    Each set has every backbone (or layer). Where no recipe was trained on all, one set of the first run of each. None
    for a single one.
    """
    spaces = list(dict.fromkeys(view.space for view in views))
    if len(spaces) < 2:
        return []
    found = []
    for recipe in dict.fromkeys(view.recipe for view in sorted(views, key=lambda view: view.opened.sae.d_sae)):
        own = {view.space: view for view in reversed(views) if view.recipe == recipe}
        if len(own) == len(spaces):
            found.append([own[space] for space in spaces])
    first = {view.space: view for view in reversed(views)}
    return found or [[first[space] for space in spaces]]


def set_name(views: Sequence[View]) -> str:
    """What the runs of a set have in common, such as ``batchtopk ×8``."""
    made = [(view.opened.cfg["variant"], view.opened.cfg["expansion"]) for view in views]
    return f"{made[0][0]} ×{made[0][1]:g}" if len(set(made)) == 1 else "one run of each"


def all_correlations(runs: Sequence[Activations]) -> Correlations:
    """Correlations of every two runs, both ways round, float32."""
    found = {}
    for a, b in combinations(range(len(runs)), 2):
        found[a, b] = correlation(runs[a], runs[b]).astype(np.float32)
        found[b, a] = found[a, b].T
    return found


def lowest(correlations: Correlations, tuples: np.ndarray) -> np.ndarray:
    """The smallest correlation [t] among the members of each of ``tuples`` [t, runs]."""
    pairs = combinations(range(tuples.shape[1]), 2)
    return np.min([correlations[a, b][tuples[:, a], tuples[:, b]] for a, b in pairs], axis=0)


def search(correlations: Correlations, n_runs: int, above: float) -> tuple[np.ndarray, np.ndarray]:
    """Tuples [t, runs] of one latent a run whose lowest correlation [t] is ``above``, the highest first.

    From every latent of every run: its most correlated latents in the others, then run by run the member that raises
    the lowest correlation most, until nothing does. No latent is in two tuples; the better one keeps it. A tuple that
    starts elsewhere may be missed, one that is found has all its correlations above.
    """
    tuples, scores = [], []
    for start in range(n_runs):
        other = (start + 1) % n_runs
        own = np.arange(len(correlations[start, other]))
        t = np.stack([own if b == start else correlations[start, b].argmax(1) for b in range(n_runs)], axis=1)
        for _ in range(ROUNDS):
            before = t.copy()
            for b in set(range(n_runs)) - {start}:
                rest = [correlations[c, b][t[:, c]] for c in range(n_runs) if c != b]
                t[:, b] = np.minimum.reduce(rest).argmax(1)
            if np.array_equal(t, before):
                break
        tuples.append(t)
        scores.append(lowest(correlations, t))
    return _disjoint(np.concatenate(tuples), np.concatenate(scores), above)


def _disjoint(tuples: np.ndarray, scores: np.ndarray, above: float) -> tuple[np.ndarray, np.ndarray]:
    used: list[set[int]] = [set() for _ in range(tuples.shape[1])]
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        if scores[i] <= above:
            break
        members = tuples[i].tolist()
        if not any(j in taken for j, taken in zip(members, used, strict=True)):
            kept.append(i)
            for j, taken in zip(members, used, strict=True):
                taken.add(j)
    return tuples[kept], scores[kept]


def shuffled_maxima(runs: Sequence[Activations], shuffles: int, rng: np.random.Generator) -> np.ndarray:
    """What chance can reach, [shuffles]: with every run's images shuffled, the best over a run's latents of the lowest
    of their largest correlations with each other run.

    The lowest correlation of a tuple is at most that of its member in this run, so no tuple, however it was searched
    for, exceeds it. The run with the fewest codes is taken, which is the quickest.
    """
    reference = min(range(len(runs)), key=lambda a: runs[a].codes.nnz)
    maxima = []
    for _ in range(shuffles):
        moved = [run.shuffled(rng.permutation(run.n_images)) for i, run in enumerate(runs) if i != reference]
        maxima.append(np.min([correlation(runs[reference], run).max(1) for run in moved], axis=0).max())
    return np.array(maxima)


def threshold_of(maxima: np.ndarray) -> float:
    """What the largest of all tuples exceeds by chance in 5 % of cases at most.

    Exact for any number of shuffles from 19, of which it is the largest: 1 / (19 + 1). ValueError for fewer.
    """
    if len(maxima) < 19:
        raise ValueError(f"A level of 5 % needs 19 shuffles; got {len(maxima)}. Raise app.universal.shuffles.")
    return float(np.sort(maxima)[ceil(0.95 * (len(maxima) + 1)) - 1])


def universal(
    views: Sequence[View], latents: int, shuffles: int, rng: np.random.Generator
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The universal latents of runs of different backbones, best first, and what was found with shuffled images.

    Columns: ``rank``, ``score`` (the lowest correlation among the members on the matching split), ``held_out`` (that on
    the held-out split), ``classes`` (that which class means alone would give there; NaN for a single class), and each
    run's ``latent_0`` …. Of each run the ``latents`` that fire most often are searched.
    """
    often = [np.sort(np.argsort(-view.fired[view.latents], kind="stable")[:latents]) for view in views]
    fit = [view.fit.take(kept) for view, kept in zip(views, often, strict=True)]
    threshold = threshold_of(shuffled_maxima(fit, shuffles, rng))
    tuples, scores = search(all_correlations(fit), len(fit), threshold)
    moved = [run.shuffled(rng.permutation(run.n_images)) for run in fit]
    by_chance, _ = search(all_correlations(moved), len(fit), threshold)
    members = [kept[tuples[:, i]] for i, kept in enumerate(often)]
    table = pd.DataFrame({"rank": np.arange(1, len(tuples) + 1), "score": scores.astype(np.float64)})
    table["held_out"], table["classes"] = _held_out(views, members)
    for i, (view, own) in enumerate(zip(views, members, strict=True)):
        table[f"latent_{i}"] = view.latents[own]
    found = {
        "threshold": threshold, "found": len(tuples), "by_chance": len(by_chance),
        "held_out": int((table["held_out"] > threshold).sum()), "searched": [len(kept) for kept in often],
    }  # fmt: skip
    return table, found


def _held_out(views: Sequence[View], members: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The lowest correlation of each tuple on the held-out split, and that of class means alone."""
    real, of_class = [], []
    for a, b in combinations(range(len(views)), 2):
        one, two = views[a].held_out, views[b].held_out
        real.append(paired_correlation(one, two, members[a], members[b]))
        of_class.append((one.classes[members[a]] * two.classes[members[b]]).sum(1))
    classes = np.min(of_class, axis=0) if views[0].held_out.classes.shape[1] > 1 else np.full(len(members[0]), np.nan)
    return np.min(real, axis=0), classes
