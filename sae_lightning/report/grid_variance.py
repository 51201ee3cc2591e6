"""The page's section on where a metric's variance comes from [ViSAEBench §5.7, Fig. 3, Table 3]."""

from __future__ import annotations

import pandas as pd

from sae_lightning.analysis.grid import METRICS
from sae_lightning.analysis.seeds import spread
from sae_lightning.analysis.variance import FINE, variance
from sae_lightning.report.grid_figures import SHARES, shares
from sae_lightning.report.grid_paper import PAPER, Paper
from sae_lightning.report.grid_runs import Grid
from sae_lightning.report.grid_section import EVALUATE, TRAIN, Picture, Section
from sae_lightning.report.grid_tables import Head, P, Table

TITLE = "Variance decomposition"
PARTS = tuple(SHARES)
OUTLIER = "mae"  # which the paper leaves out to show that the finding does not rest on it


def decomposition(grid: Grid, paper: Paper) -> Section:
    """η² of backbone, settings and the rest, as bars and tables, with the paper's."""
    found = variance(grid.main).set_index("metric")
    found = found[found[["eta_backbone", "eta_hp"]].notna().all(axis=1)]
    if found.empty:
        return Section(TITLE, missing="A decomposition needs several backbones, each with several expansions or k: "
                       f"`{TRAIN}`, then `{EVALUATE}`.")  # fmt: skip
    own = {METRICS[m].title: _parts(row) for m, row in found.iterrows()}
    theirs = {METRICS[m].title: parts for m, parts in paper.variance().items() if m in found.index}
    return Section(
        TITLE, _about(found),
        (Picture(shares(own, theirs), caption=_caption(bool(theirs))),),
        (_table_3(grid, found, paper), _tests(grid, found), *_seeds(grid)),
    )  # fmt: skip


def _parts(row: pd.Series) -> dict[str, float]:
    return {name: float(row[f"eta_{name}"]) for name in PARTS}


def _caption(with_paper: bool) -> str:
    beside = f" Thin and pale: {PAPER}." if with_paper else ""
    return "Blue: backbone; orange: expansion and k; grey: what neither explains." + beside


def _about(found: pd.DataFrame) -> tuple[str, ...]:
    says = ["Two-way analysis of variance of each metric, with backbone and setting (expansion and k together) as "
            "factors; η² is a factor’s share of the whole sum of squares."]  # fmt: skip
    uneven = found[~found["balanced"].astype(bool)]
    if len(uneven):
        says.append(f"The grid is not complete for {', '.join(map(str, uneven.index))}: up to "
                    f"{int(uneven['missing'].max())} cells lack a value, and shares need not add up to 1.")  # fmt: skip
    notes = [f"{', '.join(map(str, own.index))}: {note}." for note, own in found.groupby("note") if note]
    return (*says, *notes)


def _table_3(grid: Grid, found: pd.DataFrame, paper: Paper) -> Table:
    theirs = paper.variance()
    heads = [Head("metric"), *(Head(title, over=f"η², {grid.here}") for title, _ in SHARES.values()),
             *(Head(title, over=f"η², {PAPER}") for title, _ in SHARES.values() if theirs)]  # fmt: skip
    rows = []
    for m, row in found.sort_values("eta_backbone", ascending=False).iterrows():
        other = [theirs.get(str(m), {}).get(name) for name in PARTS] if theirs else []
        rows.append([METRICS[str(m)].title, *_parts(row).values(), *other])
    note = "The paper’s M6 is preservation on iNaturalist alone." if theirs else ""
    return Table("variance", "Shares of variance η² by factor, sorted by that of the backbone", heads, rows, note)


def _tests(grid: Grid, found: pd.DataFrame) -> Table:
    """F-tests, hp split into its parts, and backbones without the outlier."""
    fine = variance(grid.main, terms=FINE).set_index("metric")
    fewer = variance(grid.main, without=[OUTLIER]).set_index("metric")
    left_out = OUTLIER in set(grid.main["backbone"])
    heads = [Head("metric"), Head("runs", ".0f"),
             *(Head(sign, form, over=title) for name, (title, _) in SHARES.items() if name != "residual"
               for sign, form in (("F", ".1f"), ("p", P))),
             *(Head(name, over="η² of expansion × k, split") for name in ("expansion", "k", "interaction")),
             *([Head("backbone", over=f"η² without {OUTLIER.upper()}")] if left_out else [])]  # fmt: skip
    rows = [
        [METRICS[str(m)].title, row["n"], row["F_backbone"], row["p_backbone"], row["F_hp"], row["p_hp"],
         *(fine.at[m, f"eta_{name}"] for name in ("expansion", "k", "interaction")),
         *([fewer.at[m, "eta_backbone"]] if left_out else [])]
        for m, row in found.iterrows()
    ]  # fmt: skip
    return Table("variance-tests", "F-tests of the factors, and expansion and k apart", heads, rows)


def _seeds(grid: Grid) -> list[Table]:
    """How far scores move with the seed; no table where no cell has several."""
    found = spread(grid.main)
    if not found["repeated"].any():
        return []
    heads = [Head("metric"), Head("seeds of a cell", ".4f"), Head("settings of a backbone", ".4f"),
             Head("backbones", ".4f"), Head("cells with several seeds", ".0f")]  # fmt: skip
    rows = [[METRICS[r["metric"]].title, r["seeds"], r["configurations"], r["backbones"], r["repeated"]]
            for _, r in found.iterrows()]  # fmt: skip
    return [Table("seeds", "Standard deviations over seeds, settings and backbones", heads, rows)]
