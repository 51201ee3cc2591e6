"""How far scores move with the seed alone, beside how far they move with settings and backbones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from sae_lightning.analysis.cells import CELL, over_seeds
from sae_lightning.analysis.grid import METRICS


def spread(table: pd.DataFrame, of: Sequence[str] = tuple(METRICS)) -> pd.DataFrame:
    """One row a metric with sample standard deviations: over ``seeds`` of a cell (pooled over the cells that have
    several), over ``configurations`` of a backbone (of means over seeds, pooled over backbones), and of the
    ``backbones``' means. ``repeated`` counts the cells with several seeds; NaN where nothing is repeated.
    """
    cells = over_seeds(table, of)
    groups = table.groupby(CELL, dropna=False)
    of_backbones = cells.groupby(level="backbone")
    repeated = groups[list(of)].count()
    return pd.DataFrame(
        [
            {
                "metric": m, "seeds": _pooled(groups[m]), "configurations": _pooled(of_backbones[m]),
                "backbones": of_backbones[m].mean().std(), "repeated": int((repeated[m] > 1).sum()),
            }
            for m in of
        ]
    )  # fmt: skip


def _pooled(groups: pd.api.typing.SeriesGroupBy) -> float:
    """The standard deviation within groups: variances weighted by their degrees of freedom."""
    freedom = groups.count() - 1
    freedom = freedom[freedom > 0]
    return math.sqrt((groups.var()[freedom.index] * freedom).sum() / freedom.sum()) if len(freedom) else math.nan
