"""Lift: how much higher a run scores than a random dictionary on the same features at the same L0.

A score that a random dictionary has as well says nothing of the SAE [Heap et al. 2025, arXiv 2501.17727].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from sae_lightning.analysis.grid import METRICS, SETTINGS, Grid, read_grid, section
from sae_lightning.analysis.paper import Paper
from sae_lightning.metrics.core import SHOWN
from sae_lightning.metrics.part import headlines
from sae_lightning.rendering.page import TRAIN, Block, lacking
from sae_lightning.rendering.table import Head, Table
from sae_lightning.runs.run import Run
from sae_lightning.runs.scores import value_of

RANDOM = "random"  # the variant

FEATURES = ("data", "title", "features", "layer")  # what must be the same; the title tells random weights apart

TOLERANCE = 0.1  # the largest difference of L0, as a share of the run's own

SPOKEN = {"monoscore": "MonoScore", "purity": "purity", "explained_variance": "expl. var."}  # beside M1 … M7

ABOUT = (
    f"A score minus that of sae={RANDOM} on the same features, with the nearest L0 within {TOLERANCE:.0%} and, where "
    "there is one, as many latents; the mean over its seeds. Of random weights, the random dictionary on these."
)


def lift(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """``columns`` of each run less those of the random row of its ``FEATURES`` and L0; NaN where there is none.

    ``table`` has a row a run, with FEATURES, ``variant``, ``l0`` and ``d_sae``. Of random runs whose L0 is within
    ``TOLERANCE`` of a run's those of its d_sae come first, then those of the nearest L0, to a hundredth of it, which
    are averaged (seeds). The lift of a random row is NaN.
    """
    found = pd.DataFrame(float("nan"), table.index, list(columns))
    features = table[list(FEATURES)].astype(object).fillna("").apply(tuple, axis=1)
    drawn = table[(table["variant"] == RANDOM) & table["l0"].notna()]
    for name, run in table[(table["variant"] != RANDOM) & (table["l0"] > 0)].iterrows():
        near = drawn[features[drawn.index] == features[name]]
        off = (near["l0"] - run["l0"]).abs() / run["l0"]
        near = near[off <= TOLERANCE]
        if (near["d_sae"] == run["d_sae"]).any():
            near = near[near["d_sae"] == run["d_sae"]]
        if len(near):
            nearest = near[off[near.index] <= off[near.index].min() + TOLERANCE / 10]
            found.loc[name] = (run[list(columns)] - nearest[list(columns)].mean()).astype(float)
    return found


def scores(runs: Sequence[Path], split: str) -> pd.DataFrame:
    """``read_grid`` of the runs, with the core scores that are ``SPOKEN`` of."""
    rows = [[value_of(Run(run).rows, metric, split=split) for metric in SPOKEN] for run in runs]
    return read_grid(runs, split).assign(**dict(zip(SPOKEN, map(list, zip(*rows, strict=True)), strict=True)))


def lifts(table: pd.DataFrame) -> Table | None:
    """The table of all runs that have a random row; None where no run has one."""
    titles = {c.metric: c for c in SHOWN if c.metric in SPOKEN} | {c.headline: c for c in headlines()}
    columns = [name for name in titles if name in table and table[name].notna().any()]
    found = lift(table, columns)
    kept = found.dropna(how="all")
    if kept.empty:
        return None
    heads = [Head("run"), Head("backbone", drop=1), Head("L0", ".1f")]
    heads += [titles[name].head._replace(sign=True) for name in columns]
    rows = [[table.at[i, "run"], table.at[i, "title"], table.at[i, "l0"], *kept.loc[i]] for i in kept.index]
    return Table("lift", "Lift over a random dictionary", heads, rows, ABOUT)


def lift_table(runs: Sequence[Path], split: str) -> Table | None:
    """Lifts of ``runs`` over the random rows among them and beside them, in the same folder; None without any."""
    if not runs:
        return None
    beside = {path.parent for run in runs for path in run.parent.glob(f"{RANDOM}-*/scores.parquet")}
    whole = scores([*runs, *sorted(beside - set(runs))], split)
    found = lifts(whole)
    names = {run.name for run in runs}
    rows = [] if found is None else [row for row in found.rows if row[0] in names]
    return Table(found.name, found.title, found.heads, rows, found.note) if found is not None and rows else None


@section("Lift over random dictionaries")
def lift_section(grid: Grid, paper: Paper) -> Block:
    """M1–M7 of all runs less those of the random dictionary on their features."""
    table = lifts(grid.frame[[*SETTINGS, *METRICS]])
    if table is None:
        return lacking(f"No run has a random one of its L0 beside it; `{TRAIN} sae=random` makes them.")
    return [table]
