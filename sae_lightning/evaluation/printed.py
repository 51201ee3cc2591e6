"""What ``evaluate.py`` prints at its end: tables of the columns that the metrics' parts give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from sae_lightning.metrics.core import SHOWN
from sae_lightning.metrics.part import CORE, Column, headlines, parts_of
from sae_lightning.rendering.table import Head, Table, Unknown
from sae_lightning.runs.run import Run


def print_scores(runs: Sequence[Path], cfg: DictConfig) -> None:
    """The tables of ``runs``, and the baselines of those who judged how alike images are."""
    parts = parts_of(cfg.metrics)
    core_table(runs, cfg.split).show()
    beside = [column for part in parts if part.name != CORE for column in part.columns]
    if any(column.headline for column in beside):
        score_table(f"ViSAEBench on the {cfg.split} split", headlines(), runs, cfg.split).show()
    elif beside:
        plain = [column for column in beside if "{" not in column.setting]
        score_table(f"{', '.join(cfg.metrics)} on the {cfg.split} split", plain, runs, cfg.split).show()
    judges = {(s["title"], s["baseline"]) for s in (Run(run).scores["similarity"] for run in runs)}
    for title, baseline in sorted(judges):
        print(f"MonoScore by {title}; all pairs of images: {baseline:.3f}.")


def core_table(runs: Sequence[Path], split: str) -> Table:
    """The core metrics of each run."""
    rows = []
    for run in map(Run, runs):
        made, metrics = run.cfg, run.scores["metrics"]
        k = "–" if made["k"] is None else f"{made['k']:g}"
        values = (metrics.get(column.metric) for column in SHOWN)
        rows.append([run.name, made["backbone"], f"{k} of {made['d_in']}", *values])
    heads = [Head("run"), Head("backbone", drop=1), Head("k of d_in", drop=1), *(c.head for c in SHOWN)]
    return Table(CORE, f"Scores on the {split} split", heads, rows)


def score_table(title: str, columns: Sequence[Column], runs: Sequence[Path], split: str) -> Table:
    """The ``columns`` of each run, with why one has no number."""
    rows = []
    for run in map(Run, runs):
        scores = [row for row in run.rows if row["split"] == split]
        cells: list[object] = [run.name, run.cfg["backbone"]]
        for column in columns:
            value = column.of(scores)
            cells.append(value if math.isfinite(value) else Unknown(column.why(scores)))
        rows.append(cells)
    heads = [Head("run"), Head("backbone", drop=1), *(column.head for column in columns)]
    return Table("scores", title, heads, rows)
