"""Whether two families of SAEs rank the backbones alike, and by how much they differ [ViSAEBench App. Q, Table 9]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from sae_lightning.analysis.cells import CELL, backbone_means, main_family, over_seeds
from sae_lightning.analysis.correlation import spearman
from sae_lightning.analysis.grid import METRICS


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
            rows.append(
                {"metric": metric, "backbone": backbone, **row, "cells": len(own), "consistent": _one_sign(own)}
            )
        if len(means):
            sign = _one_sign(means["difference"])
            rows.append({"metric": metric, "backbone": "all", **means.mean(), "cells": len(values), "consistent": sign})
    names = ["metric", "backbone", "first", "second", "difference", "cells", "consistent"]
    return pd.DataFrame(rows, columns=names)


def _one_sign(values: pd.Series) -> bool:
    return bool((values > 0).all() or (values < 0).all())
