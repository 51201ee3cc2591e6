"""Pages over a grid: the analyses in the paper's order, and all their tables as csv and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sae_lightning.analysis.correlation import backbone_means
from sae_lightning.analysis.grid import METRICS, SECTIONS, Grid, load
from sae_lightning.analysis.hypotheses import SUPPORTED, check_hypotheses
from sae_lightning.analysis.paper import FOLDER, Paper, read_paper
from sae_lightning.analysis.recommendations import recommend
from sae_lightning.files import write_text
from sae_lightning.registry import discover
from sae_lightning.rendering.page import Block, Note, Number, Numbers, Section, page, plural
from sae_lightning.rendering.table import files, number

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


def findings(grid: Grid) -> list[Block]:
    """What a grid says in a few sentences and three numbers; sections further down say it in full."""
    table = grid.main
    names = [name for name in METRICS if name != "M5" and table[name].notna().any()]  # its judges differ
    means = backbone_means(table, names)
    first: dict[str, list[str]] = {}
    for name in names if len(means) > 1 else ():
        known = means[name].dropna()
        if known.nunique() > 1:
            at = known.idxmax() if METRICS[name].better else known.idxmin()
            first.setdefault(str(at), []).append(f"{name} ({number(float(known[at]))})")
    leads = "; ".join(f"{backbone} in {', '.join(of)}" for backbone, of in first.items())
    verdicts = check_hypotheses(table)
    verdicts = verdicts[~verdicts["check"]]["verdict"]
    related = recommend(table).metrics.dropna(subset="oriented")
    said = [f"Of hypotheses H1–H4: {', '.join(f'{n} {verdict}' for verdict, n in verdicts.value_counts().items())}."]
    if leads:
        said = [f"First by the mean over its SAEs: {leads}. M5 has a judge of its own for each backbone.", *said]
    if not related.empty:
        best = related.iloc[0]
        mean, low, high = (number(best[of], "+.2f") for of in ("oriented", "lowest", "highest"))
        said.append(f"Across backbones, {best['metric']} goes best with what is done with the features: mean ρ {mean}, "
                    f"{low} to {high} over {plural(int(best['tasks']), 'task')}.")  # fmt: skip
    return [*said, Numbers([
        Number(str(len(table)), "sparse autoencoders"), Number(str(table["backbone"].nunique()), "backbones"),
        Number(f"{(verdicts == SUPPORTED).sum()} of {len(verdicts)}", "hypotheses supported"),
    ])]  # fmt: skip


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
    write_text(
        out,
        page(title, [*findings(grid), lead(grid, out, len(runs) - len(grid.frame))], sections, tables_folder(out).name),
    )
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
