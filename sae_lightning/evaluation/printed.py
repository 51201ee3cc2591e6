"""What ``evaluate.py`` prints at its end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from sae_lightning.metrics.part import HEADLINES, headline
from sae_lightning.runs.run import SCORES
from sae_lightning.runs.scores import read_rows
from sae_lightning.saes.artefact import read_cfg

COLUMNS = {
    "explained_variance": "expl. var.", "r2": "R²", "fvu": "FVU", "l0": "L0", "dead_share": "dead", "cosine": "cosine",
    "decoder_cosine": "|cos| dec.", "decoder_nearest_cosine": "nearest dec.", "monoscore": "MonoScore",
    "purity": "purity", "weighted_purity": "weighted", "top_purity": "top-9",
}  # fmt: skip


def print_scores(runs: Sequence[Path], cfg: DictConfig) -> None:
    """The tables of ``runs``, and the baselines of those who judged how alike images are."""
    console = Console(width=max(200, Console().width))
    console.print(core_table(runs, cfg.split))
    if cfg.metrics.get("sparse_probing") is not None:
        console.print(visaebench_table(runs, cfg.split))
    judges = {(s["title"], s["baseline"]) for s in (read_scores(run)["similarity"] for run in runs)}
    for title, baseline in sorted(judges):
        console.print(f"MonoScore by {title}; all pairs of images: {baseline:.3f}.", highlight=False)


def core_table(runs: Sequence[Path], split: str) -> Table:
    """The core metrics of each run."""
    table = _table(f"Scores on the {split} split", ["k of d_in", *COLUMNS.values()])
    for run in runs:
        made, metrics = read_cfg(run), read_scores(run)["metrics"]
        k = "–" if made["k"] is None else f"{made['k']:g}"
        values = [f"{metrics[name]:.3f}" if name in metrics else "–" for name in COLUMNS]
        table.add_row(run.name, made["backbone"], f"{k} of {made['d_in']}", *values)
    return table


def visaebench_table(runs: Sequence[Path], split: str) -> Table:
    """M1–M7 of each run."""
    table = _table(f"ViSAEBench on the {split} split", [h.title for h in HEADLINES])
    for run in runs:
        rows = [row for row in read_rows(run) if row["split"] == split]
        table.add_row(run.name, read_cfg(run)["backbone"], *(_shown(headline(rows, h)) for h in HEADLINES))
    return table


def read_scores(run: Path) -> dict:
    """scores.json of a run."""
    return json.loads((run / SCORES).read_text(encoding="utf-8"))


def _shown(value: float) -> str:
    return "–" if value != value else f"{value:.3f}"


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title)
    for column in ("run", "backbone", *columns):
        table.add_column(column, justify="left" if column in ("run", "backbone") else "right", no_wrap=True)
    return table
