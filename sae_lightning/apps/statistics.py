"""Statistics of several applications: intervals, associations of latents with groups of images, fair draws."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, sparse, special, stats
from statsmodels.stats.proportion import proportion_confint

RESAMPLES = 2000


def mean_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Of the mean of ``values`` [n], by percentile bootstrap; the mean twice where all are equal or there is one."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2 or np.ptp(values) == 0:
        return float(values.mean()), float(values.mean())
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, batch=100, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def share_interval(count: float, of: int) -> tuple[float, float]:
    """Of the share ``count`` of ``of`` (Wilson)."""
    low, high = proportion_confint(count, of, method="wilson")
    return float(low), float(high)


Z95 = float(stats.norm.ppf(0.975))

BLOCK = 256  # latents ranked at once


class Association(NamedTuple):
    """Of each latent an effect size, its 95 % interval and a two-sided p, all [d_sae] float64; NaN: not defined."""

    value: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    p: np.ndarray


def auc(codes: sparse.csr_matrix, group: np.ndarray, strata: np.ndarray | None = None) -> Association:
    """Share of pairs in which the image of ``group`` has the larger magnitude, ties counting half (Mann-Whitney).

    ``codes`` [n, d_sae], ``group`` [n] bool. With ``strata`` [n] only images of one stratum are paired, and each pair
    counts alike, so that what a stratum and the group share explains nothing. The interval is DeLong's, from the
    placements; p from the rank sum's variance under the null, corrected for ties. NaN without any pair.
    """
    group = np.asarray(group, dtype=bool)
    strata = np.zeros(len(group), dtype=np.int64) if strata is None else np.asarray(strata)
    if not codes.shape[0] == len(group) == len(strata):
        raise ValueError(
            f"Expected one group and one stratum for each of {codes.shape[0]} images; got {len(group)} and "
            f"{len(strata)}."
        )
    parts = [np.flatnonzero(strata == s) for s in np.unique(strata)]
    parts = [rows for rows in parts if 0 < group[rows].sum() < len(rows)]
    columns, d_sae = codes.tocsc(), codes.shape[1]
    pairs = wins = spread = null = np.zeros(d_sae)
    for rows in parts:
        found = [_ranked(columns[:, at : at + BLOCK].toarray()[rows], group[rows]) for at in range(0, d_sae, BLOCK)]
        part_wins, part_spread, part_null = (np.concatenate(each) for each in zip(*found, strict=True))
        n_pairs = int(group[rows].sum()) * int((~group[rows]).sum())
        pairs, wins = pairs + n_pairs, wins + part_wins
        spread, null = spread + part_spread, null + part_null
    with np.errstate(divide="ignore", invalid="ignore"):
        value, half = wins / pairs, Z95 * np.sqrt(spread) / pairs
        z = np.where(null > 0, (wins - pairs / 2) / np.sqrt(null), np.where(pairs > 0, 0, np.nan))
    return Association(value, np.clip(value - half, 0, 1), np.clip(value + half, 0, 1), 2 * stats.norm.sf(np.abs(z)))


def _ranked(x: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each column of ``x`` [n, m]: pairs that the group wins, the variance of their number, and that under null."""
    ranks = stats.rankdata(x, axis=0)
    n, n_in = len(x), int(group.sum())
    n_out = n - n_in
    below = ranks[group] - stats.rankdata(x[group], axis=0)  # of the others, for each image of the group
    above = ranks[~group] - stats.rankdata(x[~group], axis=0)
    spread = n_in * below.var(0, ddof=1 if n_in > 1 else 0) + n_out * above.var(0, ddof=1 if n_out > 1 else 0)
    return below.sum(0), spread, n_in * n_out / (n * (n - 1)) * np.square(ranks - (n + 1) / 2).sum(0)


def excess(codes: sparse.csr_matrix, logits: np.ndarray, truth: np.ndarray) -> Association:
    """Bias beyond the task: what a classifier gives a latent beyond what the truth bears out, in log-odds.

    Where the latent is strong, is the positive class less frequent than the classifier says? The model is truth ~
    sigmoid(logit + b - excess · magnitude / deviation). ``logits`` are a calibrated classifier's (of training images
    they would tell the truth as they say); b takes up another share of the classes. The estimate is one Newton step
    from excess = 0, U / V of Rao's score test, which also gives p, so that it stays finite for latents that fire
    rarely. U's variance is taken as V or as the residuals tell it (the sandwich), whichever is larger: where the
    classifier is sure and wrong, V is far too small. Zero for a latent that is weighed as these images bear out,
    however much it goes with the class; positive where it draws to the positive class more than that, negative for
    the other one.

    ``codes`` [n, d_sae], ``logits`` and ``truth`` [n]. NaN for a latent that does not vary. ValueError for images of
    one class only.
    """
    truth, offset = np.asarray(truth, dtype=bool), np.asarray(logits, dtype=np.float64)
    if truth.all() or not truth.any():
        raise ValueError(
            f"Bias needs images of both classes; all {len(truth)} are of one. Widen the task or the split."
        )
    reach = 50 + np.abs(offset).max()
    b = optimize.brentq(lambda b: (special.expit(offset + b) - truth).sum(), -reach, reach)
    p = special.expit(offset + b)
    weight = p * (1 - p)
    z = sparse.csr_matrix(codes, dtype=np.float64)
    square, mean = z.multiply(z).tocsr(), np.asarray(z.mean(0)).ravel()
    variance = np.asarray(square.mean(0)).ravel() - mean**2
    whole = square.T @ weight
    centre = (z.T @ weight) / weight.sum()
    information = whole - centre * (z.T @ weight)
    known = (information > 1e-9 * whole) & (variance > 1e-9 * mean**2)
    information = np.where(known, information, np.nan)
    wrong = np.square(truth - p)
    robust = square.T @ wrong - 2 * centre * (z.T @ wrong) + centre**2 * wrong.sum()
    error = np.sqrt(np.maximum(information, robust))  # of the score
    score, deviation = z.T @ (truth - p), np.sqrt(np.maximum(variance, 0))
    value, half = -score / information * deviation, Z95 * error / information * deviation
    return Association(value, value - half, value + half, 2 * stats.norm.sf(np.abs(score) / error))


def false_discovery(p: np.ndarray) -> np.ndarray:
    """Benjamini-Hochberg's q of each p that is known; NaN stays NaN and does not count."""
    q = np.full(p.shape, np.nan)
    known = ~np.isnan(p)
    if known.any():
        q[known] = stats.false_discovery_control(p[known])
    return q


def of_latents(found: Association, tested: np.ndarray) -> Association:
    """``found`` with NaN for latents that are not among ``tested`` [d_sae] bool."""
    return Association(*(np.where(tested, each, np.nan) for each in found))


def turns(groups: np.ndarray) -> np.ndarray:
    """Of each of ``groups`` [n] how many of the same group come before it, by which they can be taken in turns."""
    series = pd.Series(groups)
    return series.groupby(series).cumcount().to_numpy()


ALIKE = 20  # latents of most equal firing, of which one is drawn


def fires_alike(latent: int, others: np.ndarray, images: np.ndarray, rng: np.random.Generator) -> int:
    """One of ``others`` [d_sae] bool, drawn from the 20 that fire on most nearly as many images; -1: none fires.

    ``images`` [d_sae] counts those that each latent fires on.
    """
    able = np.flatnonzero(others & (images > 0))
    gap = np.abs(np.log(images[able]) - np.log(images[latent]))
    near = able[np.argsort(gap, kind="stable")[:ALIKE]]
    return int(rng.choice(near)) if len(near) else -1
