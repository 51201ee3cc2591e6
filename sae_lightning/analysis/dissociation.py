"""Whether reconstruction error tells what a probe loses: FVU against preservation [ViSAEBench §5.2, Fig. 2a]."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sae_lightning.analysis.correlation import across_backbones, spearman
from sae_lightning.analysis.grid import Grid, over_seeds, section
from sae_lightning.analysis.paper import Paper
from sae_lightning.rendering.figures import NULL, figure
from sae_lightning.rendering.page import EVALUATE, Block, Picture, lacking
from sae_lightning.rendering.table import Head, P, Table

ALL = "all"

MARKS = "osD^vPX"  # of expansions, the smallest first


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


def scatter(marks: Iterable[tuple[float, float, Mapping[str, Any]]], size: tuple[float, float], **legend: Any) -> str:
    """Preservation against FVU, SVG: ``marks`` of both, with how matplotlib draws each."""
    with figure(*size, title="preservation against FVU") as drawing:
        axis = drawing.axis
        for fvu, preservation, look in marks:
            axis.scatter(fvu, preservation, **look)
        axis.axhline(1, color=NULL, lw=1, ls=":")
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.set_xlabel("M2 FVU (lower is better)")
        axis.set_ylabel("M3 preservation")
        if legend:
            axis.legend(**legend, frameon=False, fontsize=8, loc="lower left")
    return drawing.svg


@section("FVU and preservation")
def dissociation_section(grid: Grid, paper: Paper) -> Block:
    """Preservation against FVU [Fig. 2a]."""
    own = grid.main.dropna(subset=["M2", "M3"])
    if own.empty:
        return lacking(f"No run has both M2 and M3; `{EVALUATE}` makes them.")
    expansions, ks = sorted(own["expansion"].unique()), sorted(own["k"].dropna().unique())
    marks: list[tuple[float, float, dict[str, Any]]] = []
    for _, row in own.iterrows():
        size = 18 + (26 * ks.index(row["k"]) / max(1, len(ks) - 1) if row["k"] in ks else 0)
        mark = MARKS[expansions.index(row["expansion"]) % len(MARKS)]
        look = {"s": size, "marker": mark, "color": grid.colours[row["title"]], "alpha": 0.6, "lw": 0}
        marks.append((row["M2"], row["M3"], look))
    for title, mean in own.groupby("title")[["M2", "M3"]].mean().iterrows():
        ring = {"s": 150, "facecolor": "none", "edgecolor": grid.colours[str(title)], "lw": 1.8}
        marks.append((mean["M2"], mean["M3"], ring))
    handles = [Line2D([], [], ls="", marker=MARKS[i % len(MARKS)], color="#666", label=f"×{e:g}")
               for i, e in enumerate(expansions)]  # fmt: skip
    svg = scatter(marks, (5.4, 3.6), **{"handles": handles} if len(expansions) > 1 else {})
    caption = "One mark a run: the shape is its expansion, the larger the larger its k. Rings: means of backbones."
    about = "A lower FVU need not mean that a probe still reads as much. [ViSAEBench §5.2, Fig. 2a]"
    heads = [Head("over"), Head("ρ", ".2f", sign=True), Head("p", P), Head("n", ".0f"), Head("mean FVU"),
             Head("mean preservation")]  # fmt: skip
    found = dissociation(grid.main).set_index("backbone")
    order = [b for b in dict.fromkeys(grid.main["backbone"]) if b in found.index]
    rows = [[f"settings of {grid.names[b]}", *found.loc[b, ["rho", "p", "n", "x", "y"]]] for b in order]
    rows.append(["means of backbones", *found.loc[ALL, ["rho", "p", "n", "x", "y"]]])
    table = Table("fvu-preservation", "Spearman’s ρ of FVU and preservation", heads, rows,
                  "A negative ρ: the lower FVU, the more is preserved. p is exact for n ≤ 8, of t above.")  # fmt: skip
    return [about, Picture(svg, caption=caption), grid.key, table]
