"""95 % confidence intervals that several applications give."""

from __future__ import annotations

import numpy as np
from scipy import stats
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


def share_interval(count: int, of: int) -> tuple[float, float]:
    """Of the share ``count`` of ``of`` (Wilson)."""
    low, high = proportion_confint(count, of, method="wilson")
    return float(low), float(high)
