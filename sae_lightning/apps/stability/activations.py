"""Partners of latents by how their activations go together over shared images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix

from sae_lightning.metrics.dictionary import sparse_assignment
from sae_lightning.runs.identity import same_but, short_hash
from sae_lightning.runs.run import Run

DENSE = 1 << 24  # similarities held at once, 128 MB: as many as two dictionaries of 4,096 latents have

BLOCK = 1 << 22  # similarities of one block of rows where there are more

Similarity = Callable[[np.ndarray], np.ndarray]  # rows [r] int64 of n → similarities [r, m] to all of the other


class Activations(NamedTuple):
    """Codes of m latents on n images, by latent, and what their correlations need.

    ``codes`` csr [m, n] float64; ``mean`` [m]; ``scale`` [m], the inverse standard deviation, 0 for a latent that does
    not vary; ``classes`` [m, C], the means of C classes, standardised and weighted by the root of the class's share.
    """

    codes: csr_matrix
    mean: np.ndarray
    scale: np.ndarray
    classes: np.ndarray

    @property
    def n_images(self) -> int:
        return self.codes.shape[1]

    def take(self, latents: np.ndarray) -> Activations:
        """Those of ``latents`` alone."""
        return Activations(self.codes[latents], self.mean[latents], self.scale[latents], self.classes[latents])

    def shuffled(self, order: np.ndarray) -> Activations:
        """The images in another ``order`` [n]; what is known of classes is then of no use and kept as it is."""
        return self._replace(codes=self.codes.tocsc()[:, order].tocsr())


def activations(codes: csr_matrix, labels: np.ndarray | None = None) -> Activations:
    """Of codes [n, m], one row an image, and the images' classes [n] (None: all of one). Sums are float64."""
    by_latent = csr_matrix(codes.T.astype(np.float64))
    n = by_latent.shape[1]
    mean = np.asarray(by_latent.mean(1)).ravel()
    variance = np.asarray(by_latent.multiply(by_latent).mean(1)).ravel() - mean**2
    varies = variance > 1e-12 * mean**2
    scale = np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1)), 0)
    _, label = np.unique(np.zeros(n, np.int64) if labels is None else labels, return_inverse=True)
    count = np.bincount(label)
    member = csr_matrix((np.ones(n), label, np.arange(n + 1)), (n, len(count)))
    centred = np.asarray((by_latent @ member).toarray()) / count - mean[:, None]
    return Activations(by_latent, mean, scale, centred * scale[:, None] * np.sqrt(count / n))


def correlation(first: Activations, second: Activations, rows: np.ndarray | None = None) -> np.ndarray:
    """Pearson's correlation [r, m] of latents ``rows`` (by default all) of ``first`` with all m of ``second``.

    0 where a latent does not vary. From sparse products; beside the codes, memory is that of the result.
    """
    part = first if rows is None else first.take(rows)
    joint = (part.codes @ second.codes.T).toarray() / first.n_images
    joint -= np.outer(part.mean, second.mean)
    return joint * part.scale[:, None] * second.scale


def class_correlation(first: Activations, second: Activations, rows: np.ndarray | None = None) -> np.ndarray:
    """The correlation that is left on average when images are shuffled within their classes [r, m].

    In closed form, the covariance of the class means over both standard deviations: what two latents have in common
    because each prefers some classes.
    """
    return (first.classes if rows is None else first.classes[rows]) @ second.classes.T


def paired_correlation(first: Activations, second: Activations, one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """``correlation`` of latents ``one`` [p] of ``first`` with ``two`` [p] of ``second``, [p]."""
    joint = np.asarray(first.codes[one].multiply(second.codes[two]).sum(1)).ravel() / first.n_images
    return (joint - first.mean[one] * second.mean[two]) * first.scale[one] * second.scale[two]


class Matched(NamedTuple):
    """Partners ``first`` [p] (ascending) and ``second`` [p] int64 with their ``similarity`` [p], p = min(n, m).

    ``nearest_first`` [n] and ``nearest_second`` [m] are the largest similarity of each to any of the other.
    """

    first: np.ndarray
    second: np.ndarray
    similarity: np.ndarray
    nearest_first: np.ndarray
    nearest_second: np.ndarray


def match(similarity: Similarity, n: int, m: int, candidates: int = 64, dense: int = DENSE) -> Matched:
    """One-to-one partners of n and m latents with the largest sum of similarities (each from -1 to 1).

    Exact (``linear_sum_assignment``) up to ``dense`` similarities, n · m. Beyond that over the pairs in which one is
    among the other's ``candidates`` most alike, as a sparse graph, in O((n + m) · candidates) memory; latents that this
    leaves without a partner share out what is left among themselves. Twice 24,576 latents on 5,000 images of 400 codes
    take 40 s and 0.4 GB beside the codes on one thread; of 8,192, where both were solved, the mean similarity was
    0.3823 against 0.3824 of the exact one. ValueError where n or m is 0.
    """
    if n == 0 or m == 0:
        raise ValueError(f"Expected two dictionaries with latents; got {n} and {m}.")
    if n * m <= dense:
        all_of_them = similarity(np.arange(n))
        first, second = linear_sum_assignment(all_of_them, maximize=True)
        return Matched(first, second, all_of_them[first, second], all_of_them.max(1), all_of_them.max(0))
    row, column, value, nearest_first, nearest_second = _candidates(similarity, n, m, candidates)
    partner = sparse_assignment(row, column, value, n, m) if n <= m else _turned(row, column, value, n, m)
    first = np.flatnonzero(partner >= 0)
    found = np.empty(n)
    found[first] = value[np.searchsorted(row * m + column, first * m + partner[first])]
    rest, free = np.flatnonzero(partner < 0), np.setdiff1d(np.arange(m), partner)
    if len(rest) and len(free):
        step = max(1, BLOCK // m)
        left = np.concatenate([similarity(rest[i : i + step])[:, free] for i in range(0, len(rest), step)])
        here, there = linear_sum_assignment(left, maximize=True)
        partner[rest[here]], found[rest[here]] = free[there], left[here, there]
    first = np.flatnonzero(partner >= 0)
    return Matched(first, partner[first], found[first], nearest_first, nearest_second)


def _turned(row: np.ndarray, column: np.ndarray, value: np.ndarray, n: int, m: int) -> np.ndarray:
    backward = sparse_assignment(column, row, value, m, n)
    partner = np.full(n, -1, dtype=np.int64)
    partner[backward[backward >= 0]] = np.flatnonzero(backward >= 0)
    return partner


def _candidates(similarity: Similarity, n: int, m: int, k: int) -> tuple[np.ndarray, ...]:
    """Pairs in which one is among the other's ``k`` most alike, each once and in order; the largest of each, [n], [m].

    By blocks of rows; of the columns' best so far ``k`` are kept.
    """
    step = max(1, BLOCK // m)
    k_row, k_column = min(k, m), min(k, n)
    of_rows, best = [], np.full((0, m), -np.inf)
    where = np.empty((0, m), dtype=np.int64)
    values = []
    for start in range(0, n, step):
        rows = np.arange(start, min(n, start + step))
        block = similarity(rows)
        chosen = np.argpartition(-block, k_row - 1, axis=1)[:, :k_row].copy()  # a view would keep the whole block
        of_rows.append(chosen)
        values.append(np.take_along_axis(block, chosen, 1))
        best = np.concatenate([best, block])
        where = np.concatenate([where, np.broadcast_to(rows[:, None], block.shape)])
        if len(best) > k_column:
            kept = np.argpartition(-best, k_column - 1, axis=0)[:k_column]
            best, where = np.take_along_axis(best, kept, 0), np.take_along_axis(where, kept, 0)
    to_second, by_row = np.concatenate(of_rows), np.concatenate(values)
    row = np.concatenate([np.repeat(np.arange(n), k_row), where.T.ravel()])
    column = np.concatenate([to_second.ravel(), np.repeat(np.arange(m), len(where))])
    _, place = np.unique(row * m + column, return_index=True)
    value = np.concatenate([by_row.ravel(), best.T.ravel()])[place]
    return row[place], column[place], value, by_row.max(1), best.max(0)


SAME_START = ", same start"


@dataclass(frozen=True)
class View:
    """A run as stability sees it.

    ``space`` is what its decoder's rows live in (backbone, layer, kind of features). ``fired`` [d_sae] int64 counts the
    images of the matching split that a latent fires on. ``latents`` [m] are those matched by activation, and ``fit``
    and ``held_out`` their activations on the matching and on the held-out split.
    """

    opened: Run
    label: str
    space: tuple[Any, ...]
    recipe: str
    fired: np.ndarray
    latents: np.ndarray
    fit: Activations
    held_out: Activations

    @property
    def name(self) -> str:
        return self.opened.name


def relation(one: View, two: View) -> str:
    """How two runs differ: in "seed", "expansion" or "settings", else in their "backbone", layer or features.

    Two of the same seed are "expansion, same start" or "settings, same start": a dictionary's first directions are
    drawn by the seed, those of a smaller one are the first of a larger one's, and training may leave them near.
    """
    if one.space != two.space:
        return "backbone"
    seeds = [view.opened.cfg["seed"] for view in (one, two)]
    start = SAME_START if seeds[0] is not None and seeds[0] == seeds[1] else ""
    for name, ignored in {"seed": ("seed",), "expansion": ("seed", "expansion", "d_sae")}.items():
        if same_but(one.opened.cfg, *ignored) == same_but(two.opened.cfg, *ignored):
            return name + start
    return "settings" + start


def views_of(
    opened: Sequence[Run], fit: str, held_out: str, images: int, min_images: int, latents: int | None,
    rng: np.random.Generator,
) -> tuple[list[View], dict[str, list[str]]]:  # fmt: skip
    """Every run on the images of both splits that all runs share, at most ``images`` of each, and their ids by split.

    A latent is matched by activation where it fires on ``min_images`` images of ``fit`` or more, and is among the
    ``latents`` of its run that fire most often. ValueError where the runs have no image in common, or one has no such
    latent.
    """
    ids = {split: shared_images(opened, split, images, rng) for split in (fit, held_out)}
    views = []
    for run, label in zip(opened, labels_of(opened), strict=True):
        codes = {split: codes_of(run, split, ids[split]) for split in ids}
        fired = np.bincount(codes[fit].indices[codes[fit].data > 0], minlength=codes[fit].shape[1])
        often = np.argsort(-fired, kind="stable")[:latents]
        kept = np.sort(often[fired[often] >= min_images])
        if not len(kept):
            raise ValueError(
                f"No latent of {run.name} fires on {min_images} of {len(ids[fit])} images of {fit}; lower "
                "app.min_images, or give more images (app.images)."
            )
        parts = []
        for split in ids:
            store = run.store(split)
            labels = store.labels.numpy()[store.find(ids[split])[0]]
            parts.append(activations(codes[split][:, kept], labels))
        views.append(View(run, label, space_of(run), recipe_of(run), fired, kept, *parts))
    return views, ids


def shared_images(opened: Sequence[Run], split: str, at_most: int, rng: np.random.Generator) -> list[str]:
    """Ids of the images of ``split`` that all runs have, in the first run's order; at most so many, drawn by ``rng``.

    Images of different data sets differ, whatever their ids. ValueError with two runs that have none in common.
    """
    first = opened[0].store(split)
    ids = list(first.image_ids)
    for run in opened[1:]:
        store = run.store(split)
        here = set(store.image_ids) if store.data == first.data else set()
        ids = [image_id for image_id in ids if image_id in here]
        if not ids:
            raise ValueError(
                f"{opened[0].name} ({first.data}) and {run.name} ({store.data}) have no image of {split} in common, by "
                "which latents are matched; give runs on the same data (run=…)."
            )
    if len(ids) > at_most:
        ids = [ids[i] for i in np.sort(rng.choice(len(ids), at_most, replace=False))]
    return ids


def codes_of(run: Run, split: str, image_ids: Sequence[str]) -> csr_matrix:
    """Codes [n, d_sae] of these images, pooled by maximum, in this order; only these are encoded."""
    store = run.store(split)
    places = store.find(image_ids)[0]
    if len(places) == len(store):
        return run.codes(split)[places]
    return run.encode_images(store, places)


def space_of(run: Run) -> tuple[Any, ...]:
    """Backbone, layer, kind of features and d_in: what must be the same for directions to be comparable."""
    return tuple(run.cfg[name] for name in ("backbone", "layer", "features", "d_in"))


def recipe_of(run: Run) -> str:
    """A hash of what the SAE is, beside the features that it was trained on and its seed."""
    sae = run.config["sae"]
    kept = {name: run.cfg[name] for name in ("variant", "expansion", "k", "features")}
    return short_hash(kept | {"sae": sae})


def labels_of(opened: Sequence[Run]) -> list[str]:
    """A short name of each run, different for each: with its k, seed or full name where others are called alike."""
    found = [run.label for run in opened]
    for sign, values in {
        " k": [run.cfg["k"] for run in opened], " s": [run.cfg["seed"] for run in opened],
        " ": [run.name for run in opened],
    }.items():  # fmt: skip
        alike: dict[str, set[Any]] = {}
        for label, value in zip(found, values, strict=True):
            alike.setdefault(label, set()).add(value)
        found = [
            f"{label}{sign}{value}" if len(alike[label]) > 1 else label
            for label, value in zip(found, values, strict=True)
        ]
    return found
