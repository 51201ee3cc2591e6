"""How much two dictionaries have in common, latent by latent, beside what chance gives."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from sae_lightning.apps.stability.activations import (
    SAME_START,
    View,
    class_correlation,
    correlation,
    match,
    paired_correlation,
    relation,
)
from sae_lightning.metrics.dictionary import Matching, match_latents, nearest_cosine
from sae_lightning.saes import SAE

RELATIONS = ("seed", "expansion", "settings", "expansion, same start", "settings, same start", "backbone")
MATRICES = {"decoder": "W_dec", "encoder": "W_enc"}
ACTIVATION = "activation"
ABOVE = (0.5, 0.7, 0.9)


def chosen_pairs(views: Sequence[View], at_most: int) -> tuple[list[tuple[str, View, View]], int]:
    """Pairs of runs with how they differ, the closest relations first, and how many there are in all.

    Of more than ``at_most`` those of the last relations are left out, evenly within a relation. Of two sizes the
    smaller dictionary comes first.
    """
    found: dict[str, list[tuple[str, View, View]]] = {name: [] for name in RELATIONS}
    for one, two in combinations(views, 2):
        if two.opened.sae.d_sae < one.opened.sae.d_sae and one.space == two.space:
            one, two = two, one
        how = relation(one, two)
        found[how].append((how, one, two))
    kept: list[tuple[str, View, View]] = []
    for pairs in found.values():
        room = min(len(pairs), at_most - len(kept))
        kept += [pairs[i] for i in np.linspace(0, len(pairs) - 1, room).round().astype(int)] if room > 0 else []
    return kept, sum(map(len, found.values()))


def random_like(rows: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """``count`` random directions [count, d] with the mean and covariance of ``rows`` [n, d]."""
    data = rows.double().numpy()
    covariance = np.atleast_2d(np.cov(data.T)) if len(data) > 1 else np.eye(data.shape[1])
    drawn = rng.multivariate_normal(data.mean(0), covariance, count, method="eigh", check_valid="ignore")
    return torch.from_numpy(drawn).float()


def matched_directions(one: View, two: View, rng: np.random.Generator) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """Partners by the cosine of decoder rows, and apart from that of encoder rows [MSAE App. H], of alive latents.

    The null is a random dictionary of the second's mean and covariance, of as many alive latents. Of runs with the
    same start, ``start`` is the similarity that the first's untrained directions have with the second's trained ones:
    what both have in common before they have learnt anything.
    """
    a, b = (torch.from_numpy(np.flatnonzero(view.fired)) for view in (one, two))
    rows, tables, found = [], [], {}
    for kind, weights in MATRICES.items():
        first, second = (getattr(v.opened.sae, weights).detach()[alive] for v, alive in ((one, a), (two, b)))
        found[kind] = match_latents(first, second)
        null = match_latents(first, random_like(second, len(second), rng))
        table = _table(kind, one, two, a[found[kind].first].numpy(), b[found[kind].second].numpy())
        table["similarity"] = found[kind].cosine.numpy()
        table["null"] = _along(table["latent_a"], a[null.first].numpy(), null.cosine.numpy())
        near = nearest_cosine(first, second).numpy(), nearest_cosine(second, first).numpy()
        if relation(one, two).endswith(SAME_START):
            before = match_latents(getattr(untrained(one), weights).detach()[a], second)
            table["start"] = _along(table["latent_a"], a[before.first].numpy(), before.cosine.numpy())
        rows.append(summary(kind, one, two, table, near, null.cosine.numpy()))
        tables.append(table)
    for row in rows:
        row["agree"] = agreement(found["decoder"], found["encoder"])
    return rows, pd.concat(tables, ignore_index=True)


def matched_activations(
    one: View, two: View, rng: np.random.Generator, candidates: int = 64
) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """Partners by the correlation of activations over the shared images, matched on ``fit``, kept on ``held_out``.

    The assignment picks what chance makes large, so the null is an assignment too, with the images of the second run
    shuffled. ``classes`` is the same for what class means alone would give, matched and then kept in the same way.
    """
    n, m = len(one.latents), len(two.latents)
    found = match(lambda rows: correlation(one.fit, two.fit, rows), n, m, candidates)
    order = rng.permutation(two.fit.n_images)
    moved = two.fit.shuffled(order)
    null = match(lambda rows: correlation(one.fit, moved, rows), n, m, candidates)
    table = _table(ACTIVATION, one, two, one.latents[found.first], two.latents[found.second])
    table["similarity"] = found.similarity
    table["null"] = _along(table["latent_a"], one.latents[null.first], null.similarity)
    table["held_out"] = paired_correlation(one.held_out, two.held_out, found.first, found.second)
    if one.fit.classes.shape[1] > 1:
        by_class = match(lambda rows: class_correlation(one.fit, two.fit, rows), n, m, candidates)
        kept = (one.held_out.classes[by_class.first] * two.held_out.classes[by_class.second]).sum(1)
        table["classes"] = _along(table["latent_a"], one.latents[by_class.first], kept)
    row = summary(ACTIVATION, one, two, table, (found.nearest_first, found.nearest_second), null.similarity)
    return [row], table


def summary(
    kind: str, one: View, two: View, table: pd.DataFrame, nearest: tuple[np.ndarray, np.ndarray], null: np.ndarray
) -> dict[str, Any]:  # fmt: skip
    """A pair of runs in numbers: the mean over partners with its 95 % t interval over latents, shares above, nulls.

    ``frequency_rho`` is Spearman's correlation of similarity and firing rate. NaN where a figure is not defined.
    """
    similarity = table["similarity"].to_numpy()
    low, high = interval(similarity)
    row: dict[str, Any] = {
        "run_a": one.name, "run_b": two.name, "label_a": one.label, "label_b": two.label, "kind": kind,
        "latents_a": len(nearest[0]), "latents_b": len(nearest[1]), "matched": len(table),
        "mean": similarity.mean(), "low": low, "high": high, "median": np.median(similarity),
        **{f"above_{t:g}": (similarity > t).mean() for t in ABOVE},
        "null_mean": null.mean(), **{f"null_above_{t:g}": (null > t).mean() for t in ABOVE},
        "nearest_a": nearest[0].mean(), "nearest_b": nearest[1].mean(),
        **{f"nearest_{side}_above_{t:g}": (near > t).mean() for side, near in zip("ab", nearest, strict=True)
           for t in ABOVE},
        "frequency_rho": _spearman(table["firing_a"].to_numpy(), similarity),
    }  # fmt: skip
    for column in ("held_out", "classes", "start"):
        if column in table:
            row[f"{column}_mean"] = table[column].mean()
            row[f"{column}_low"], row[f"{column}_high"] = interval(table[column].dropna().to_numpy())
    return row


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % t interval of the mean; NaN for fewer than two values."""
    if len(values) < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean() - half), float(values.mean() + half)


def agreement(decoder: Matching, encoder: Matching) -> float:
    """The share of latents that decoder and encoder give the same partner."""
    partner = dict(zip(decoder.first.tolist(), decoder.second.tolist(), strict=True))
    same = [partner.get(i) == j for i, j in zip(encoder.first.tolist(), encoder.second.tolist(), strict=True)]
    return float(np.mean(same))


def untrained(view: View) -> SAE:
    """The run's SAE as its seed made it."""
    sae = view.opened.sae
    settings: dict[str, Any] = dict(sae.settings())
    return type(sae)(sae.d_in, sae.d_sae, seed=view.opened.cfg["seed"], **settings)


def _table(kind: str, one: View, two: View, latent_a: np.ndarray, latent_b: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({
        "run_a": one.name, "run_b": two.name, "kind": kind, "latent_a": latent_a, "latent_b": latent_b,
        "firing_a": one.fired[latent_a] / one.fit.n_images, "firing_b": two.fired[latent_b] / two.fit.n_images,
    })  # fmt: skip


def _along(latents: pd.Series, of: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``values`` of the latents ``of`` in the order of ``latents``; NaN where there is none."""
    return pd.Series(values, index=of).reindex(latents).to_numpy()


def _spearman(one: np.ndarray, two: np.ndarray) -> float:
    varied = len(one) > 2 and np.ptp(one) > 0 and np.ptp(two) > 0
    return float(stats.spearmanr(one, two).statistic) if varied else float("nan")
