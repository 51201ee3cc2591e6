"""Building the page over a grid: the paper's analyses in its order, and all their tables as csv and LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jinja2

from sae_lightning import __version__
from sae_lightning.analysis.codes_lift import lift
from sae_lightning.analysis.dissociation import dissociation_section
from sae_lightning.analysis.grid import Grid, load
from sae_lightning.analysis.hypotheses import hypotheses, metric_task
from sae_lightning.analysis.layers import layers
from sae_lightning.analysis.overview import means_table, profiles, settings, what_was_run
from sae_lightning.analysis.paper import FOLDER, Paper, read_paper
from sae_lightning.analysis.rank_consistency import families
from sae_lightning.analysis.recommendations import guide
from sae_lightning.analysis.tables import cross_domain, probing, raw_moran, thresholds
from sae_lightning.analysis.variance import decomposition
from sae_lightning.files import write_text
from sae_lightning.rendering.page import Section, plural, prose
from sae_lightning.rendering.table import files, view

SECTIONS: tuple[Callable[[Grid, Paper], Section], ...] = (
    what_was_run, profiles, means_table, raw_moran, dissociation_section,
    metric_task, decomposition, hypotheses, probing, cross_domain, thresholds,
    lift, layers, families, guide, settings,
)  # fmt: skip


def build_grid(runs: Sequence[Path], out: Path, paper: Path = FOLDER) -> Path:
    """Write the page over evaluated ``runs`` to ``out``, and its tables to ``<out's stem>-tables`` beside it.

    The paper's figures, csv files in the folder ``paper``, stand beside ours where there are any.

    FileNotFoundError when no run has scores, ValueError when they are of different splits.
    """
    grid, printed = load(runs), Paper(read_paper(paper) or {})
    sections = [section(grid, printed) for section in SECTIONS]
    folder = out.with_name(f"{out.stem}-tables")
    write_files(folder, files(table for section in sections for table in section.tables))
    write_text(out, render(grid, sections, folder.name, len(runs) - len(grid.frame)))
    return out


def write_files(folder: Path, texts: Mapping[str, str]) -> None:
    """Files in ``folder``, which is made; csv and tex files there of other names, of an earlier page, are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*folder.glob("*.csv"), *folder.glob("*.tex")):
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        write_text(folder / name, text)


def render(grid: Grid, sections: Sequence[Section], tables: str, unscored: int = 0) -> str:
    """The page's HTML; ``tables`` is the name of the tables' folder, ``unscored`` the number of runs left out."""
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("sae_lightning.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("grid.html")
    return template.render(
        grid=grid, sections=sections, tables=tables, unscored=unscored, view=view, prose=prose, plural=plural,
        version=__version__,
        colours={title: grid.colours[title] for title in grid.titles},
    )  # fmt: skip
