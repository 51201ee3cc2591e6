"""Whether two families of SAEs rank the backbones alike, and by how much they differ [ViSAEBench App. Q, Table 9]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from sae_lightning.analysis.correlation import spearman
from sae_lightning.analysis.grid import CELL, METRICS, Grid, backbone_means, main_family, one_sign, over_seeds, section
from sae_lightning.analysis.paper import PAPER, Paper
from sae_lightning.rendering.page import TRAIN, Block, lacking, slug, some
from sae_lightning.rendering.table import Head, P, Table


class Consistency(NamedTuple):
    """What two families have in common, as tables.

    ``metrics``: one row a metric with the ``first`` and ``second`` family's backbones from best to worst, ``rho``,
    ``p``, ``p_t``, ``n``. ``differences``: second minus first, see ``differences``. ``dropped``: the runs left out,
    with their ``reason``.
    """

    metrics: pd.DataFrame
    differences: pd.DataFrame
    dropped: pd.DataFrame


def rank_consistency(
    table: pd.DataFrame, first: str = "batchtopk", second: str = "jumprelu", tolerance: float | None = 2.0
) -> Consistency:
    """Compare two variants by their backbones' means over the runs with |L0 − k| ≤ ``tolerance`` (None keeps all).

    Of each variant the runs of its ``main_family`` count. ValueError where the table has no run of one of the two.
    """
    for variant in (first, second):
        if not (table["variant"] == variant).any():
            there = ", ".join(sorted(set(table["variant"]))) or "none"
            raise ValueError(f"There is no run of variant {variant} in this grid (it has {there}); train some.")
    families = [main_family(table[table["variant"] == variant]) for variant in (first, second)]
    dropped = [off_target(rows, tolerance) for rows in families]
    a, b = (rows.drop(off.index) for rows, off in zip(families, dropped, strict=True))
    of_a, of_b = (backbone_means(rows, list(METRICS)) for rows in (a, b))
    ranks = [{"metric": metric, **compare(of_a[metric], of_b[metric], METRICS[metric].better)} for metric in METRICS]
    return Consistency(pd.DataFrame(ranks), differences(a, b), pd.concat(dropped))


def compare(first: pd.Series, second: pd.Series, better: bool) -> dict[str, object]:
    """Two rankings of the backbones that both have, as tuples from best to worst, and their correlation."""
    both = pd.concat([first, second], axis=1, keys=["first", "second"]).dropna()
    found = spearman(both["first"], both["second"])
    best = {side: tuple(both[side].sort_values(ascending=not better, kind="stable").index) for side in both}
    return best | {"rho": found.rho, "p": found.p, "p_t": found.p_t, "n": found.n}


def off_target(table: pd.DataFrame, tolerance: float | None = 2.0) -> pd.DataFrame:
    """The runs whose L0 is further than ``tolerance`` from k, or has no k to compare with; with a ``reason``."""
    if tolerance is None:
        return table.iloc[:0].assign(reason="")
    away = (table["l0"] - table["k"]).abs()
    rows = table[~(away <= tolerance)]
    return rows.assign(reason=[_why(l0, k) for l0, k in zip(rows["l0"], rows["k"], strict=True)])


def _why(l0: float, k: float) -> str:
    return "no k to aim at" if pd.isna(k) else "no L0" if pd.isna(l0) else f"L0 {l0:.1f}, aimed at {k:g}"


def differences(
    first: pd.DataFrame, second: pd.DataFrame, of: Sequence[str] = (*METRICS, "dead_share")
) -> pd.DataFrame:
    """Second minus first at matched settings: cells (backbone, expansion and k) that both families have.

    One row a metric and backbone, and one with ``backbone`` "all", the mean over the backbones: ``difference``,
    ``first``, ``second`` (means over the matched cells), ``cells``, and ``consistent``: whether it has one sign, in all
    cells of the backbone or all backbones.
    """
    keys = CELL[1:]
    a, b = over_seeds(first, of).reset_index(), over_seeds(second, of).reset_index()
    pairs = a.merge(b, on=["backbone", *keys], suffixes=(" first", " second"))
    rows = []
    for metric in of:
        columns = {f"{metric} {side}": side for side in ("first", "second")}
        values = pairs[["backbone", *columns]].rename(columns=columns).dropna()
        values["difference"] = values["second"] - values["first"]
        groups = values.groupby("backbone")
        means = groups[["first", "second", "difference"]].mean()
        for backbone, row in means.iterrows():
            own = groups.get_group(backbone)["difference"]
            rows.append({"metric": metric, "backbone": backbone, **row, "cells": len(own), "consistent": one_sign(own)})
        if len(means):
            sign = one_sign(means["difference"])
            rows.append({"metric": metric, "backbone": "all", **means.mean(), "cells": len(values), "consistent": sign})
    names = ["metric", "backbone", "first", "second", "difference", "cells", "consistent"]
    return pd.DataFrame(rows, columns=names)


@section("Families of SAEs")
def families(grid: Grid, paper: Paper) -> Block:
    """Whether another variant ranks the backbones alike [App. Q, Table 9]."""
    first = str(grid.main["variant"].iloc[0])
    comparable = grid.comparable()
    others = [v for v in dict.fromkeys(comparable["variant"]) if v != first]
    if not others:
        return lacking(f"All runs are of {first}: train a second variant on the same backbones, "
                       f"`{TRAIN.replace('grid', 'jumprelu')}`, and evaluate it.")  # fmt: skip
    about, tables = ["Backbones from best to worst by their means, over runs whose L0 is within 2 of k. "
                     "[ViSAEBench App. Q, Table 9]"], []  # fmt: skip
    for second in others:
        found = rank_consistency(comparable, first, second)
        if len(found.dropped):
            left = [f"{run} ({why})" for run, why in zip(found.dropped["run"], found.dropped["reason"], strict=True)]
            about.append(f"Left out with {second}: {some(left, 4)}.")
        tables += [_table_9(grid, found, first, second, paper), *_differences(grid, found, first, second)]
    return [about, tables]


def _table_9(grid: Grid, found: Consistency, first: str, second: str, paper: Paper) -> Table:
    theirs = paper.ranks() if (first, second) == ("batchtopk", "jumprelu") else {}
    heads = [Head("metric"), Head(first, over=grid.here), Head(second, over=grid.here),
             Head("ρ", ".2f", over=grid.here, sign=True), Head("exact p", P, over=grid.here),
             Head("p of t", P, over=grid.here),
             *([Head(first, over=PAPER), Head(second, over=PAPER), Head("ρ", ".2f", over=PAPER, sign=True),
                Head("p as printed", P, over=PAPER)] if theirs else [])]  # fmt: skip
    rows = []
    for _, r in found.metrics.iterrows():
        own = [METRICS[r["metric"]].title, *(_ranking(grid, r[side]) for side in ("first", "second")), r["rho"],
               r["p"], r["p_t"]]  # fmt: skip
        printed = theirs.get(r["metric"], {})
        rows.append([*own, *(printed.get(c) for c in ("batchtopk", "jumprelu", "rho", "p") if theirs)])
    return Table(f"ranks-{slug(second)}", f"Rankings of backbones by {first} and by {second}", heads, rows)


def _ranking(grid: Grid, names: tuple[str, ...]) -> str:
    return ", ".join(grid.names[name].removesuffix(" (tiny)") for name in names) or "–"


def _differences(grid: Grid, found: Consistency, first: str, second: str) -> list[Table]:
    rows = found.differences
    if rows.empty:
        return []
    of = [name for name in grid.names if name in set(rows["backbone"])]
    wide = rows.pivot(index="metric", columns="backbone", values="difference")
    overall = rows[rows["backbone"] == "all"].set_index("metric")
    heads = [Head("metric"), Head("all", sign=True), *(Head(grid.names[name], sign=True) for name in of),
             Head("same sign for all"), Head("matched cells", ".0f")]  # fmt: skip
    lines = [
        ["dead share" if m == "dead_share" else METRICS[str(m)].title, r["difference"], *(wide.at[m, b] for b in of),
         "yes" if r["consistent"] else "no", r["cells"]]
        for m, r in overall.iterrows()
    ]  # fmt: skip
    return [Table(f"differences-{slug(second)}", f"{second} minus {first} at the same expansion and k", heads, lines)]
