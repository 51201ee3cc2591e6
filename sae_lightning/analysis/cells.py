"""Cells of a grid: a backbone and a configuration, which is an expansion and a k; seeds are repetitions of a cell."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pandas as pd

CONFIGURATION = ["expansion", "k"]
CELL = ["backbone", *CONFIGURATION]
KIND = ["data", "features", "variant", "monoloss"]
FAMILY = [*KIND, "recipe"]


def main_family(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that a cross-backbone analysis compares: of the most frequent data, features, variant, MonoLoss weight
    and other settings (the first of equals) those of the layer that each backbone has most runs of (the deepest of
    equals). So runs of one cell differ by their seed alone.
    """
    if table.empty:
        return table
    family = [column for column in FAMILY if column in table]
    sizes = table.groupby(family, dropna=False, sort=False).size()
    rows = table[(table[family] == list(sizes.idxmax())).all(axis=1)]  # type: ignore[arg-type]
    return rows[rows["layer"].fillna(-1) == rows["backbone"].map(_usual_layers(rows))]


def _usual_layers(rows: pd.DataFrame) -> dict[str, float]:
    layers = rows["layer"].fillna(-1)
    return {name: float(max(layers[of.index].mode())) for name, of in rows.groupby("backbone")}


def configuration_names(table: pd.DataFrame) -> pd.Series:
    """``x8 k64`` of each row; ``x8`` without a k."""
    k = table["k"].map(lambda k: f" k{k:g}", na_action="ignore").astype(object).fillna("")
    return table["expansion"].map(lambda x: f"x{x:g}").astype(object) + k


def missing_cells(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Backbones and configurations that the table has, but not together."""
    have = list(zip(table["backbone"], configuration_names(table), strict=True))
    wanted = product(dict.fromkeys(table["backbone"]), dict.fromkeys(configuration_names(table)))
    return [cell for cell in wanted if cell not in set(have)]


def shared_configurations(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of the configurations that every backbone of the table has: a fair comparison in an unfinished grid."""
    names = configuration_names(table)
    of = table.groupby(names)["backbone"].nunique()
    return table[names.map(of) == table["backbone"].nunique()]


def over_seeds(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Means over the seeds of each cell, indexed by backbone, expansion and k; NaN is left out of means."""
    return table.groupby(CELL, dropna=False)[list(columns)].mean()


def backbone_means(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Means over configurations, indexed by backbone: what ViSAEBench correlates across backbones [§4.5].

    Seeds of a cell are averaged first, so that no configuration counts more for having several. A column that the
    table lacks is NaN.
    """
    wide = table.reindex(columns=[*CELL, *columns])
    return over_seeds(wide, columns).groupby(level="backbone").mean()


def backbone_stds(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Sample standard deviations over configurations, as ``backbone_means``; NaN with one configuration."""
    wide = table.reindex(columns=[*CELL, *columns])
    return over_seeds(wide, columns).groupby(level="backbone").std()
