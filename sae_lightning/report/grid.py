"""Pages over a grid: the analyses in the paper's order, and all their tables as csv and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sae_lightning.analysis.grid import METRICS, SECTIONS, Grid, load
from sae_lightning.analysis.paper import FOLDER, Paper, read_paper
from sae_lightning.files import write_text
from sae_lightning.registry import discover
from sae_lightning.rendering.page import Note, Section, page, plural
from sae_lightning.rendering.table import files

OURS = (  # those of other packages follow
    "What was run", "Profiles of backbones", "Means of backbones", "Spatial order of the features themselves",
    "FVU and preservation", "Metrics and tasks", "Variance decomposition", "Lift over random dictionaries",
    "Hypotheses H1–H4", "Sparse-probing curves", "Other data sets", "Thresholds of M7", "Codes lift", "Layers",
    "Families of SAEs", "Recommendations", "Every setting",
)  # fmt: skip


def analyses(grid: Grid, paper: Path = FOLDER) -> list[Section]:
    """The sections of all analyses, beside the paper's figures: csv files in the folder ``paper``, if any."""
    discover("sae_lightning.analysis")
    printed = Paper(read_paper(paper) or {})
    return [SECTIONS[title](grid, printed) for title in dict.fromkeys([*OURS, *SECTIONS])]


def tables_folder(out: Path) -> Path:
    """Where the tables of the page ``out`` lie."""
    return out.with_name(f"{out.stem}-tables")


def lead(grid: Grid, out: Path, unscored: int = 0) -> Note:
    """What the grid is of, where its tables are, and that runs are left out which are ``unscored``."""
    left = f"Left out: {plural(unscored, 'run')} without scores. " if unscored else ""
    where = f"{tables_folder(out).name}/ beside this page, as csv with unrounded numbers and as LaTeX."
    return Note(f"Scale and data: {grid.scale}. {left}All tables are in {where}")


def grid_of(runs: Sequence[Path]) -> Grid | None:
    """The grid that evaluated ``runs`` make: two backbones or more, each with the same two settings or more.

    None where they do not, or were scored on different splits or by the core metrics alone.
    """
    try:
        grid = load(runs)
    except ValueError:  # of different splits
        return None
    cells = grid.main.groupby(["expansion", "k"], dropna=False)["backbone"].nunique()
    scored = grid.main[[name for name in METRICS if name != "M2"]].notna().any(axis=None)
    return grid if scored and (cells > 1).sum() > 1 else None


def build_grid(runs: Sequence[Path], out: Path, paper: Path = FOLDER) -> Path:
    """Write the page over evaluated ``runs`` to ``out``, and its tables to ``<out's stem>-tables`` beside it.

    The paper's figures, csv files in the folder ``paper``, stand beside ours where there are any.

    FileNotFoundError when no run has scores, ValueError when they are of different splits.
    """
    grid = load(runs)
    sections = analyses(grid, paper)
    write_tables(sections, out)
    title = f"ViSAEBench over {plural(len(grid.main), 'sparse autoencoder')}"
    write_text(out, page(title, [lead(grid, out, len(runs) - len(grid.frame))], sections, tables_folder(out).name))
    return out


def write_tables(sections: Sequence[Section], out: Path) -> None:
    """The sections' tables into the folder of the page ``out``; those there of an earlier page are removed."""
    folder = tables_folder(out)
    texts: Mapping[str, str] = files(table for section in sections for table in section.tables)
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*folder.glob("*.csv"), *folder.glob("*.tex")):
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        write_text(folder / name, text)
