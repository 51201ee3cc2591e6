"""Whether SAE codes help weak backbones more than strong ones [ViSAEBench App. O, Table 8]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from sae_lightning.analysis.correlation import NO_TASKS, spearman, task_title
from sae_lightning.analysis.grid import Grid, backbone_means, backbone_stds, section, tasks
from sae_lightning.analysis.paper import PAPER, Paper
from sae_lightning.rendering.figures import NULL, panels
from sae_lightning.rendering.page import Block, Picture, lacking
from sae_lightning.rendering.table import Head, P, Spread, Table


class Lift(NamedTuple):
    """``tasks``: one row a task with ``rho`` of the mean raw score and the mean lift across backbones, ``p``, ``p_t``,
    ``n``, the backbones ``lowest`` and ``highest`` with their lifts, and how many are ``above`` 1. ``backbones``: one
    row a task and backbone with ``raw``, ``codes``, ``lift`` and ``lift_std`` over configurations.
    """

    tasks: pd.DataFrame
    backbones: pd.DataFrame


def codes_lift(table: pd.DataFrame) -> Lift:
    """Lift = score of codes / score of raw features, averaged over the configurations of a backbone.

    Tasks without both scores are left out, as are runs whose raw score is 0.
    """
    overall, each = [], []
    for task in tasks(table):
        raw, codes = f"{task}/raw", f"{task}/codes"
        if raw not in table or codes not in table:
            continue
        rows = table.assign(lift=table[codes] / table[raw].replace(0, np.nan))
        means = backbone_means(rows, [raw, codes, "lift"]).dropna()
        if means.empty:
            continue
        stds = backbone_stds(rows, ["lift"])["lift"]
        found, lift = spearman(means[raw], means["lift"]), means["lift"]
        overall.append({
            "task": task, "rho": found.rho, "p": found.p, "p_t": found.p_t, "n": found.n,
            "lowest": lift.idxmin(), "lowest_lift": lift.min(), "highest": lift.idxmax(), "highest_lift": lift.max(),
            "above": int((lift > 1).sum()),
        })  # fmt: skip
        each += [
            {"task": task, "backbone": name, "raw": row[raw], "codes": row[codes], "lift": row["lift"],
             "lift_std": stds[name]}
            for name, row in means.iterrows()
        ]  # fmt: skip
    overall_columns = ["task", "rho", "p", "p_t", "n", "lowest", "lowest_lift", "highest", "highest_lift", "above"]
    each_columns = ["task", "backbone", "raw", "codes", "lift", "lift_std"]
    return Lift(pd.DataFrame(overall, columns=overall_columns), pd.DataFrame(each, columns=each_columns))


@section("Codes lift")
def lift(grid: Grid, paper: Paper) -> Block:
    """What codes give over raw features, and whether weak backbones gain most [App. O, Table 8]."""
    found = codes_lift(grid.main)
    if found.tasks.empty:
        return lacking(NO_TASKS)
    each = found.backbones.assign(title=found.backbones["backbone"].map(grid.names))
    frames = {task_title(str(task)): own for task, own in each.groupby("task", sort=False)}
    with panels(list(frames), 2.75, 2.3) as drawing:
        for axis, frame in zip(drawing.axes.flat, frames.values(), strict=False):
            for _, row in frame.iterrows():
                axis.errorbar(
                    row["raw"], row["lift"], row["lift_std"], fmt="o", ms=6, lw=1, color=grid.colours[row["title"]]
                )
            axis.axhline(1, color=NULL, lw=1, ls=":")
            axis.xaxis.set_major_locator(MaxNLocator(4))
            axis.set_xlabel("raw features")
        drawing.axis.set_ylabel("codes / raw")
    return [
        "Lift is the score of codes over that of raw features, averaged over settings. A negative ρ of raw score and "
        "lift says that weaker backbones gain more. [ViSAEBench App. O]",
        Picture(drawing.svg), grid.key, _table_8(grid, found, paper), _each_lift(each, grid.titles),
    ]  # fmt: skip


def _table_8(grid: Grid, found: Lift, paper: Paper) -> Table:
    heads = [Head("of"), Head("task"), Head("ρ(raw, lift)", ".2f", sign=True), Head("exact p", P), Head("p of t", P),
             Head("lowest lift"), Head("highest lift"), Head("above 1")]  # fmt: skip
    rows: list[list[object]] = [
        [grid.here, task_title(r["task"]), r["rho"], r["p"], r["p_t"],
         *(f"{grid.names[r[end]]} {r[f'{end}_lift']:.2f}" for end in ("lowest", "highest")),
         f"{r['above']} of {r['n']}"]
        for _, r in found.tasks.iterrows()
    ]  # fmt: skip
    rows += [[PAPER, task_title(t["task"]), t["rho"], None, t["p"], t["lowest"], t["highest"], "–"]
             for t in paper.lifts()]  # fmt: skip
    return Table("codes-lift", "Correlation of raw score and lift across backbones", heads, rows)


def _each_lift(each: pd.DataFrame, order: Sequence[str]) -> Table:
    heads = [Head("backbone"), *(Head(name, form, over=task_title(task))
                                 for task in dict.fromkeys(each["task"])
                                 for name, form in (("raw", ".3f"), ("codes", ".3f"), ("lift", ".3f")))]  # fmt: skip
    rows: list[list[object]] = []
    for title in order:
        row: list[object] = [title]
        for task in dict.fromkeys(each["task"]):
            own = each[(each["task"] == task) & (each["title"] == title)]
            r = own.iloc[0] if len(own) else None
            row += [None] * 3 if r is None else [r["raw"], r["codes"], Spread(r["lift"], r["lift_std"])]
        rows.append(row)
    return Table(
        "codes-lift-backbones", "Raw features, codes, and lift ± standard deviation over settings", heads, rows
    )
