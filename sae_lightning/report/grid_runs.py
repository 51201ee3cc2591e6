"""The runs of a page over a grid: which belong to the main comparison, and their scores by setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from sae_lightning.analysis.cells import backbone_means, backbone_stds, main_family
from sae_lightning.analysis.grid import read_grid
from sae_lightning.benchmark.evaluate import SCORES
from sae_lightning.benchmark.table import read_rows
from sae_lightning.report.grid_figures import ORDER, colours
from sae_lightning.saes.artefact import read_json


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
    scored = [run for run in runs if (run / SCORES).is_file()]
    if not scored:
        raise FileNotFoundError(f"None of {len(runs)} runs has scores; make them with evaluate.py metrics=visaebench.")
    anew = "make it anew: python evaluate.py runs={}"
    splits = sorted({read_json(run / SCORES, anew.format(run.name))["split"] for run in scored})
    if len(splits) > 1:
        raise ValueError(f"The runs were scored on different splits ({', '.join(splits)}); evaluate them on one.")
    frame = in_order(read_grid(scored, splits[0]))
    found = [row for run in scored for row in read_rows(run, strict=True) if row["split"] == splits[0]]
    rows = pd.DataFrame(found, columns=["run", "metric", "setting", "value"])
    return Grid(frame, main_family(frame), rows, splits[0], colours(frame))


def in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs by backbone in the paper's order, then expansion, k and seed."""
    rank = frame["backbone"].map({name: i for i, name in enumerate(ORDER)}).fillna(len(ORDER))
    ordered = frame.assign(rank=rank).sort_values(["rank", "backbone", "layer", "expansion", "k", "seed"])
    return ordered.drop(columns="rank").reset_index(drop=True)
