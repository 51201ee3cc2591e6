"""Whether reconstruction error tells what a probe loses: FVU against preservation [ViSAEBench §5.2, Fig. 2a]."""

from __future__ import annotations

import pandas as pd

from sae_lightning.analysis.correlation import across_backbones, spearman
from sae_lightning.analysis.figures import scatter
from sae_lightning.analysis.grid import Grid, over_seeds, section
from sae_lightning.analysis.paper import Paper
from sae_lightning.rendering.page import EVALUATE, Block, Picture, lacking
from sae_lightning.rendering.table import Head, P, Table

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


@section("FVU and preservation")
def dissociation_section(grid: Grid, paper: Paper) -> Block:
    """Preservation against FVU [Fig. 2a]."""
    own = grid.main.dropna(subset=["M2", "M3"])
    if own.empty:
        return lacking(f"No run has both M2 and M3; `{EVALUATE}` makes them.")
    picture = Picture(
        scatter(own, "M2", "M3", ("M2 FVU (lower is better)", "M3 preservation"), grid.colours), "",
        "One mark a run: the shape is its expansion, the larger the larger its k. Rings: means of backbones.",
    )  # fmt: skip
    about = "A lower FVU need not mean that a probe still reads as much. [ViSAEBench §5.2, Fig. 2a]"
    heads = [Head("over"), Head("ρ", ".2f", sign=True), Head("p", P), Head("n", ".0f"), Head("mean FVU"),
             Head("mean preservation")]  # fmt: skip
    found = dissociation(grid.main).set_index("backbone")
    order = [b for b in dict.fromkeys(grid.main["backbone"]) if b in found.index]
    rows = [[f"settings of {grid.names[b]}", *found.loc[b, ["rho", "p", "n", "x", "y"]]] for b in order]
    rows.append(["means of backbones", *found.loc[ALL, ["rho", "p", "n", "x", "y"]]])
    table = Table("fvu-preservation", "Spearman’s ρ of FVU and preservation", heads, rows,
                  "A negative ρ: the lower FVU, the more is preserved. p is exact for n ≤ 8, of t above.")  # fmt: skip
    return [about, picture, grid.key, table]
