"""Many evaluated runs as one table: their settings, M1–M7, and the downstream tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from sae_lightning.analysis.paper import Paper
from sae_lightning.metrics.part import INPUTS, downstream, headlines
from sae_lightning.registry import Registry
from sae_lightning.rendering.figures import COLOURS
from sae_lightning.rendering.page import Block, Key, Section
from sae_lightning.runs.identity import monoloss_of, same_but
from sae_lightning.runs.run import SCORES, Run
from sae_lightning.runs.scores import value_of

ORDER = ("dinov2", "clip", "siglip", "mae", "deit")  # of the paper; others follow, and take the next colours


class About(NamedTuple):
    """A metric's ``title``, and whether more of it is ``better``."""

    title: str
    better: bool


METRICS = {column.headline: About(column.title, bool(column.better)) for column in headlines()}

UNTRAINED = "random weights"  # in a backbone's title, and then after its short name

ENDS = tuple(f"/{name}" for name in INPUTS)

SETTINGS = (
    "run", "data", "backbone", "title", "features", "layer", "variant", "monoloss", "expansion", "k", "seed", "d_in",
    "d_sae", "l0", "dead_share", "recipe",
)  # fmt: skip

OTHER_COLUMNS = (  # leaves of a run's identity that the table has as columns
    "data.*", "backbone", "layer", "features", "sae.name", "callbacks.MonoLoss", "callbacks.MonoLoss.weight",
    "expansion", "d_sae", "sae.settings.k", "sae.target_l0", "seed",
)  # fmt: skip

FLOATS = ("layer", "monoloss", "expansion", "k", "l0", "dead_share")


def read_grid(runs: Sequence[Path], split: str = "test") -> pd.DataFrame:
    """One row a run: ``SETTINGS``, ``M1`` … ``M7``, and ``TASK/raw``, ``TASK/reconstruction``, ``TASK/codes`` of each
    downstream task found in any run.

    ``backbone`` is the short name (``dinov2``, or ``dinov2, random weights``), ``title`` that of the tables (``dinov2
    (tiny)``). ``monoloss`` is the weight, 0 without, and ``recipe`` is equal for runs whose other settings are equal.
    TASK is ``retrieval`` (R@1), ``segmentation:DATA`` (mIoU), ``accuracy:DATA`` (linear probes on another data set) or
    ``probing:DATA`` (sparse probing AUC at k = 128 on another data set, codes alone). NaN stands where a run has no
    such score on ``split``. ArtefactError for a folder without a readable cfg.json.
    """
    return _table([Run(run) for run in runs], split)


def _table(runs: Sequence[Run], split: str) -> pd.DataFrame:
    rows = [_row(run, split) for run in runs]
    found = {name for row in rows for name in row} - {*SETTINGS, *METRICS}
    table = pd.DataFrame(rows, columns=[*SETTINGS, *METRICS, *sorted(found)])
    numbers = [*FLOATS, *METRICS, *sorted(found)]
    return table.astype(dict.fromkeys(numbers, float))


def tasks(table: pd.DataFrame) -> list[str]:
    """The downstream tasks of which the table has a value, sorted."""
    return sorted({c.rpartition("/")[0] for c in table if c.endswith(ENDS) and table[c].notna().any()})


def _row(run: Run, split: str) -> dict[str, Any]:
    cfg, config = run.cfg, run.config
    scores = [r for r in run.rows if r["split"] == split]
    untrained = f", {UNTRAINED}" if UNTRAINED in cfg["backbone"] else ""
    settings = {
        "run": run.name, "data": cfg["data"], "backbone": config["backbone"]["name"] + untrained,
        "title": cfg["backbone"], "features": cfg["features"], "layer": cfg["layer"], "variant": cfg["variant"],
        "monoloss": monoloss_of(config)[0], "expansion": cfg["expansion"], "k": cfg["k"], "seed": cfg["seed"],
        "d_in": cfg["d_in"], "d_sae": cfg["d_sae"], "l0": value_of(scores, "l0"),
        "dead_share": value_of(scores, "dead_share"), "recipe": same_but(cfg, *OTHER_COLUMNS),
    }  # fmt: skip
    return settings | {column.headline: column.of(scores) for column in headlines()} | dict(_tasks(scores))


def _tasks(scores: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, float]]:
    wanted = downstream()
    for row in scores:
        for task in wanted:
            if column := task.column(row["metric"], row["setting"]):
                yield column, row["value"]


CONFIGURATION = ["expansion", "k"]

CELL = ["backbone", *CONFIGURATION]

KIND = ["data", "features", "variant", "monoloss"]

FAMILY = [*KIND, "recipe"]


def main_family(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that a cross-backbone analysis compares: of the most frequent data, features, variant, MonoLoss weight
    and other settings (the first of equals) those of the layer that each backbone has most runs of (the deepest of
    equals). So runs of one cell differ by their seed alone. Backbones with random weights are left out beside others.
    """
    trained = table[~table["title"].str.contains(UNTRAINED, regex=False)] if len(table) else table
    table = table if trained.empty else trained
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


def one_sign(values: pd.Series) -> bool:
    """Whether all are above zero, or all below."""
    return bool((values > 0).all() or (values < 0).all())


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


@dataclass(frozen=True)
class Grid:
    """What the page is over: ``frame`` of all runs, ``main`` of those compared, and ``rows`` of all runs' scores.

    ``rows`` has columns run, metric, setting, value; ``colours`` are by title of a backbone, in the page's order.
    """

    frame: pd.DataFrame
    main: pd.DataFrame
    rows: pd.DataFrame
    split: str
    colours: dict[str, str]

    @property
    def titles(self) -> list[str]:
        """The main runs' backbones in the page's order."""
        return [title for title in self.colours if title in set(self.main["title"])]

    @property
    def names(self) -> dict[str, str]:
        """Titles of backbones by their short names."""
        return dict(zip(self.frame["backbone"], self.frame["title"], strict=True))

    def means(self, columns: Sequence[str], frame: pd.DataFrame | None = None) -> pd.DataFrame:
        """Means of columns of the main runs, or of a ``frame``, over configurations: [title, column] in page order."""
        return backbone_means(self.main if frame is None else frame, columns).rename(index=self.names).loc[self.titles]

    def stds(self, columns: Sequence[str], frame: pd.DataFrame | None = None) -> pd.DataFrame:
        """Standard deviations over configurations, as ``means``."""
        return backbone_stds(self.main if frame is None else frame, columns).rename(index=self.names).loc[self.titles]

    @property
    def key(self) -> Key:
        """What the colours of figures stand for."""
        return Key([(title, self.colours[title]) for title in self.titles])

    @property
    def tiny(self) -> bool:
        """Whether a backbone is a small stand-in."""
        return any("(tiny)" in title for title in self.frame["title"])

    @property
    def scale(self) -> str:
        """The main runs' encoders, widths and data, such as ``tiny ViT, 128 wide, demo``."""
        kinds = [title.removeprefix(name).strip(" ()") for name, title in self.names.items() if title in self.titles]
        widths = [f"{width:g}" for width in sorted(set(self.main["d_in"]))]
        said = ["tiny ViT" if kind == "tiny" else kind for kind in dict.fromkeys(kinds) if kind]
        return ", ".join([*said, f"{' or '.join(widths)} wide", *dict.fromkeys(self.main["data"])])

    @property
    def here(self) -> str:
        """What stands over our figures where the paper's are beside them."""
        return f"here: {self.scale}"

    def curves(self, metric: str) -> pd.DataFrame:
        """A metric's settings with the main runs' columns: setting, value, title, expansion, k."""
        own = self.rows[self.rows["metric"] == metric]
        return own.merge(self.main[["run", "title", "expansion", "k", "seed"]], on="run")

    def comparable(self) -> pd.DataFrame:
        """The main runs, with those that differ by variant alone: of their data, features and layers, no MonoLoss."""
        like = ["data", "features", "backbone", "layer"]
        return self.frame[self.frame["monoloss"] == 0].merge(self.main[like].drop_duplicates(), on=like)


def load(runs: Sequence[Path]) -> Grid:
    """The grid of evaluated run folders; only those with scores.

    FileNotFoundError where none has scores, ValueError where they were scored on different splits.
    """
    scored = [Run(run) for run in runs if (run / SCORES).is_file()]
    if not scored:
        raise FileNotFoundError(f"None of {len(runs)} runs has scores; make them with evaluate.py metrics=visaebench.")
    splits = sorted({run.scores["split"] for run in scored})
    if len(splits) > 1:
        raise ValueError(f"The runs were scored on different splits ({', '.join(splits)}); evaluate them on one.")
    frame = in_order(_table(scored, splits[0]))
    found = [row for run in scored for row in run.rows if row["split"] == splits[0]]
    rows = pd.DataFrame(found, columns=["run", "metric", "setting", "value"])
    return Grid(frame, main_family(frame), rows, splits[0], colours(frame))


Analysis = Callable[[Grid, Paper], Section]

SECTIONS: Registry[Analysis] = Registry("section")


def section(title: str) -> Callable[[Callable[[Grid, Paper], Block]], Analysis]:
    """A decorator that makes ``analysis(grid, paper)``, which gives blocks, a section of pages over a grid."""

    def decorate(analysis: Callable[[Grid, Paper], Block]) -> Analysis:
        @wraps(analysis)
        def made(grid: Grid, paper: Paper) -> Section:
            return Section(title, analysis(grid, paper))

        return SECTIONS.add(title, made)

    return decorate


def colours(frame: pd.DataFrame) -> dict[str, str]:
    """Colours by title of a grid's backbones: the paper's in its order, each in a colour of its own, then others."""
    titles = dict(zip(frame["backbone"], frame["title"], strict=True))
    order = [*ORDER, *sorted(set(titles) - set(ORDER))]
    return {titles[name]: COLOURS[i % len(COLOURS)] for i, name in enumerate(order) if name in titles}


def in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs by backbone in the paper's order, then expansion, k and seed."""
    rank = frame["backbone"].map({name: i for i, name in enumerate(ORDER)}).fillna(len(ORDER))
    ordered = frame.assign(rank=rank).sort_values(["rank", "backbone", "layer", "expansion", "k", "seed"])
    return ordered.drop(columns="rank").reset_index(drop=True)
