"""Whether reconstruction error tells what a probe loses: FVU against preservation [ViSAEBench §5.2, Fig. 2a]."""

from __future__ import annotations

import pandas as pd

from sae_lightning.analysis.cells import over_seeds
from sae_lightning.analysis.correlation import spearman
from sae_lightning.analysis.metric_tasks import across_backbones

ALL = "all"


def dissociation(table: pd.DataFrame, x: str = "M2", y: str = "M3") -> pd.DataFrame:
    """Spearman's ρ of two columns over the configurations of each ``backbone``, and over the backbones' means
    ("all"): ``rho``, ``p``, ``p_t``, ``n``, and the means ``x`` and ``y``.
    """
    cells = over_seeds(table, [x, y])
    rows = []
    for backbone, own in cells.groupby(level="backbone"):
        found = spearman(own[x], own[y])
        rows.append((backbone, found.rho, found.p, found.p_t, found.n, own[x].mean(), own[y].mean()))
    found = across_backbones(table, x, y)
    rows.append((ALL, found.rho, found.p, found.p_t, found.n, cells[x].mean(), cells[y].mean()))
    return pd.DataFrame(rows, columns=["backbone", "rho", "p", "p_t", "n", "x", "y"])
