"""Tables of ViSAEBench: one line an SAE, grouped by backbone, the best marked: pure functions of the runs' rows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import pandas as pd

from sae_lightning.metrics.part import CORE, Column, all_parts, headlines, spelled_out
from sae_lightning.metrics.protocols import PAPER, RELEASED
from sae_lightning.rendering.table import NOTHING, Group, Head, Table, number
from sae_lightning.runs.scores import read_rows

NAN = float("nan")

IDENTITY = ("data", "backbone", "features", "layer", "variant", "expansion", "k", "seed")


@dataclass(frozen=True, eq=False)
class Scored:
    """A ``run`` of the page with its ``rows``, those of the split that the page shows, and beside them those that the
    ``released`` package's protocol gave."""

    run: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    released: Sequence[Mapping[str, Any]] = ()

    @cached_property
    def values(self) -> dict[tuple[str, str], float]:
        """Values by metric and setting, with the number of dead latents."""
        values = {(row["metric"], row["setting"]): row["value"] for row in self.rows}
        return {("dead", ""): self.run["cfg"]["d_sae"] - values.get(("alive", ""), NAN)} | values

    def value(self, metric: str, setting: str = "") -> float:
        """One value; NaN where there is none."""
        return self.values.get((metric, setting), NAN)

    def of(self, column: Column) -> float:
        """What it has in a column; NaN where there is nothing."""
        if column.protocol == RELEASED:
            return column.of(self.released)
        if column.setting.endswith("*"):
            return column.of(self.rows)
        whole = self.value(column.per) if column.per else 1.0
        return self.value(column.metric, column.setting) / whole if whole else NAN

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """(budget, value) of a metric whose settings are one number each, such as ``k=128``, ascending; all is inf."""
        points = [(s.rpartition("=")[2], v) for (name, s), v in self.values.items() if name == metric and s]
        return sorted((math.inf if budget == "all" else float(budget), value) for budget, value in points)

    @property
    def backbone(self) -> str:
        """The features that it is of: the title of its group."""
        return f"{self.run['cfg']['backbone']} {self.run['features']}".strip()

    @property
    def kind(self) -> str:
        """Its variant, and MonoLoss where it was trained with it."""
        weight = self.run["weight"]
        return str(self.run["cfg"]["variant"]) + (f" + MonoLoss {weight:g}" if weight else "")

    @property
    def label(self) -> str:
        """What tells it apart within its group."""
        return str(self.run["label"]).split(" · ", 1)[-1]


def main_columns() -> list[Column]:
    """The headlines of all parts, and what stands beside them."""
    return [*headlines(), *(column for part in all_parts() for column in part.columns if column.always)]


def released_columns() -> list[Column]:
    """The headlines as the released package has them."""
    return headlines(RELEASED)


def scored_runs(runs: Sequence[Mapping[str, Any]]) -> list[Scored]:
    """The runs that have more than core scores, those of one backbone together, by variant, expansion, k and seed."""

    def rows(run: Mapping[str, Any], protocol: str) -> list[dict[str, Any]]:
        return [r for r in read_rows(run["folder"], strict=True, protocol=protocol) if r["split"] == run["split"]]

    found = [Scored(run, rows(run, PAPER), rows(run, RELEASED)) for run in runs]
    found = [sae for sae in found if sae.released or any(row["part"] != CORE for row in sae.rows)]
    backbones = list(dict.fromkeys(sae.backbone for sae in found))

    def place(sae: Scored) -> tuple[Any, ...]:
        cfg = sae.run["cfg"]
        settings = (cfg["variant"], sae.run["weight"], cfg["expansion"], cfg["k"] or 0, cfg["seed"])
        return (backbones.index(sae.backbone), *settings)

    return sorted(found, key=place)


def by_backbone(saes: Sequence[Scored]) -> dict[str, list[Scored]]:
    """SAEs, sorted by backbone, by the features that they are of."""
    return {title: list(members) for title, members in groupby(saes, lambda sae: sae.backbone)}


def table(saes: Sequence[Scored], columns: Sequence[Column], colours: Mapping[str, str], notes: bool = False) -> Table:
    """A line an SAE, grouped by backbone, with what each one's features give where ``notes`` are asked for."""
    groups = [Group(title, len(members), colours.get(title, ""), raw_note(members) if notes else "")
              for title, members in by_backbone(saes).items()]  # fmt: skip
    rows = [
        [sae.label, *(column.cell([*sae.rows, *sae.released], sae.of(column)) for column in columns)] for sae in saes
    ]
    return Table("", "", [Head("SAE"), *(column.head for column in columns)], rows, groups=groups, of="features")


def raw_note(saes: Sequence[Scored]) -> str:
    """What the features of one backbone give without an SAE, and how much of their spatial order its ``saes`` keep."""
    raw, null = (_first(saes, metric) for metric in ("channel_moran", "channel_moran_null"))
    kept = [share for sae in saes if math.isfinite(share := sae.of(Column("", "moran", per="channel_moran")))]
    ends = dict.fromkeys(number(end, ".2f") for end in (min(kept, default=NAN), max(kept, default=NAN)))
    parts = [
        ("Moran's I of the channels {} (null {})", (number(raw), number(null))),
        ("M1 is {} of that", ("–".join(ends),)),
        ("linear probe {}", (number(_first(saes, "accuracy_raw"), ".1%"),)),
        ("R@1 {}", (number(_first(saes, "retrieval_raw", "k=1"), ".1%"),)),
    ]
    return " · ".join(text.format(*numbers) for text, numbers in parts if numbers[0] != NOTHING)


def _first(saes: Sequence[Scored], metric: str, setting: str = "") -> float:
    """The value of a metric that all SAEs of a backbone share."""
    return next((v for sae in saes if math.isfinite(v := sae.value(metric, setting))), NAN)


def scores_csv(saes: Sequence[Scored]) -> str:
    """All rows of all SAEs with unrounded values; an empty cell where there is no number."""
    rows = [
        {"run": sae.run["name"], **{name: sae.run["cfg"].get(name) for name in IDENTITY}, "monoloss": sae.run["weight"],
         **{name: row.get(name, PAPER) for name in ("part", "split", "protocol", "metric", "setting")},
         "value": row["value"] if math.isfinite(row["value"]) else None,
         **{name: row.get(name) for name in ("n", "unit", "low", "high")}}
        for sae in saes for row in (*sae.rows, *sae.released)
    ]  # fmt: skip
    return str(pd.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n"))


@dataclass(frozen=True)
class Topic:
    """A table of details."""

    title: str
    about: str
    columns: list[Column]


def topics(saes: Sequence[Scored]) -> list[Topic]:
    """The tables of details by title, those of headlines first, of columns in which some SAE has a value."""
    columns: dict[str, list[Column]] = {}
    about: dict[str, str] = {}
    for part in all_parts():
        own = part.title or part.name
        about[own] = about.get(own) or part.about
        for column in (column for column in part.columns if not (column.headline or column.always)):
            columns.setdefault(column.table or own, []).append(column)
    found = dict.fromkeys(name for sae in saes for name in sae.values)
    made = []
    for title in sorted(columns, key=lambda title: (re.match(r"M\d", title) is None, title)):
        spelled = spelled_out(columns[title], found)
        filled = [column for column in spelled if any(math.isfinite(sae.of(column)) for sae in saes)]
        made += [Topic(title, about[title], filled)] if filled else []
    return made
