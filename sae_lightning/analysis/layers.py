"""What changes between SAEs of an early and a late layer of the same backbone [ViSAEBench App. D, Fig. 4]."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from sae_lightning.analysis.cells import CONFIGURATION, FAMILY
from sae_lightning.analysis.grid import METRICS

MATCH = [*FAMILY, "backbone", *CONFIGURATION, "seed"]
COLUMNS = ["backbone", "metric", "early_layer", "late_layer", "early", "late", "difference", "cells", "consistent"]


def layer_differences(
    table: pd.DataFrame, early: float | None = None, late: float | None = None, of: Sequence[str] = tuple(METRICS)
) -> pd.DataFrame:
    """One row a backbone and metric over runs that differ only by layer; no rows where there are none.

    Columns: ``backbone``, ``metric``, ``early_layer``, ``late_layer``, means ``early`` and ``late`` over the matched
    runs, their ``difference`` (late minus early), the number of matched ``cells``, and whether the difference is
    ``consistent``, of one sign in all of them. The layers are each backbone's first and last unless given.
    """
    rows = []
    for backbone, runs in table.dropna(subset="layer").groupby("backbone", sort=False):
        first = runs["layer"].min() if early is None else early
        last = runs["layer"].max() if late is None else late
        if first == last:
            continue
        sides = [runs.loc[runs["layer"] == layer, [*MATCH, *of]] for layer in (first, last)]
        pairs = sides[0].merge(sides[1], on=MATCH, suffixes=("/early", "/late"))
        for metric in of:
            values = pairs[[f"{metric}/early", f"{metric}/late"]].dropna()
            if len(values):
                a, b = values.mean()
                change = values.iloc[:, 1] - values.iloc[:, 0]
                consistent = bool((change > 0).all() or (change < 0).all())
                rows.append((backbone, metric, first, last, a, b, b - a, len(values), consistent))
    return pd.DataFrame(rows, columns=COLUMNS)
