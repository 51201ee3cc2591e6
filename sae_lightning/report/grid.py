"""Building the page over a grid: the paper's analyses in its order, and all their tables as csv and LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

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
from sae_lightning.rendering.page import Note, Section, page, plural
from sae_lightning.rendering.table import files

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
    title = f"ViSAEBench over {plural(len(grid.main), 'sparse autoencoder')}"
    write_text(out, page(title, [lead(grid, folder.name, len(runs) - len(grid.frame))], sections, folder.name))
    return out


def write_files(folder: Path, texts: Mapping[str, str]) -> None:
    """Files in ``folder``, which is made; csv and tex files there of other names, of an earlier page, are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*folder.glob("*.csv"), *folder.glob("*.tex")):
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        write_text(folder / name, text)


def lead(grid: Grid, tables: str, unscored: int) -> Note:
    """The page's first sentences; ``tables`` is the folder of the tables, ``unscored`` the number of runs left out."""
    left = f"Left out: {plural(unscored, 'run')} without scores. " if unscored else ""
    where = f"All tables are in {tables}/ beside this page, as csv with unrounded numbers and as LaTeX."
    return Note(f"Scale and data: {grid.scale}. {left}{where}")
