"""How sure a score is: its 95 % interval, by a percentile bootstrap over what it is a mean of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from sae_lightning.metrics.base import Score

DRAWS, MOST = 1000, 1000  # of more units than MOST, so many groups of them are drawn


@lru_cache(8)
def _drawn(n: int, draws: int, seed: int) -> np.ndarray:
    """How often each of ``n`` units is drawn, [draws, n]."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws).astype(np.float64)


def averaged(
    metric: str, values: Any, setting: str = "", of: Any = None, unit: str = "pictures", n: int | None = None,
    why: str = "", draws: int = DRAWS, seed: int = 0,
) -> Score:  # fmt: skip
    """The mean of ``values`` [n] of so many units (of pictures, latents, classes …), or their sum over that of ``of``.

    Units whose value is NaN are left out; ``n`` counts them otherwise, where each stands for several. There is no
    interval of fewer than two, and NaN where there is a reason ``why``.
    """
    top = np.asarray(values, dtype=np.float64)
    below = np.ones(len(top)) if of is None else np.asarray(of, dtype=np.float64)
    known = ~(np.isnan(top) | np.isnan(below))
    top, below = top[known], below[known]
    n = int(np.count_nonzero(below)) if n is None else n
    if why or not below.sum():
        return Score(metric, math.nan, setting, why, n, unit)
    value, group = float(top.sum() / below.sum()), np.arange(len(top)) % MOST
    if len(top) < 2:
        return Score(metric, value, setting, "", n, unit)
    weights = _drawn(min(len(top), MOST), draws, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (weights @ np.bincount(group, top)) / (weights @ np.bincount(group, below))
    low, high = np.nanpercentile(found, (2.5, 97.5))
    return Score(metric, value, setting, "", n, unit, float(low), float(high))


def named(found: Mapping[str, Any], sure: Mapping[str, Score] | None = None) -> list[Score]:
    """Named figures as scores, with the intervals of those that ``sure`` has."""
    return [_with(Score(name, float(value)), (sure or {}).get(name)) for name, value in found.items()]


def _with(score: Score, sure: Score | None) -> Score:
    return score if sure is None else score._replace(n=sure.n, unit=sure.unit, low=sure.low, high=sure.high)
