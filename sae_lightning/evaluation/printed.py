"""What ``evaluate.py`` prints at its end: tables of the columns that the metrics' parts give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from sae_lightning.metrics.core import SHOWN
from sae_lightning.metrics.part import CORE, Column, headlines, parts_of
from sae_lightning.metrics.protocols import PAPER, protocols_of
from sae_lightning.rendering.table import Head, Table
from sae_lightning.runs.run import Run
from sae_lightning.runs.scores import read_rows


def print_scores(runs: Sequence[Path], cfg: DictConfig, data: str = "") -> None:
    """The tables of ``runs`` on their own data, or ``data``, and the baselines of who judged how alike images are."""
    parts, on = parts_of(cfg.metrics), f"on the {cfg.split} split" + (f" of {data}" if data else "")
    core_table(f"Scores {on}", runs, cfg.split, data).show()
    beside = [column for part in parts if part.base != CORE for column in part.columns]
    if any(column.headline for column in beside):
        for protocol in protocols_of(cfg.metrics):
            by = "" if protocol == PAPER else f" by the {protocol} protocol"
            score_table(f"ViSAEBench {on}{by}", headlines(protocol), runs, cfg.split, data).show()
    elif beside:
        plain = [column for column in beside if "{" not in column.setting]
        score_table(f"{', '.join(cfg.metrics)} {on}", plain, runs, cfg.split, data).show()
    judges = {(s["title"], s["baseline"]) for s in (Run(run).scores["similarity"] for run in runs if not data)}
    for title, baseline in sorted(judges):
        print(f"MonoScore by {title}; all pairs of images: {baseline:.3f}.")


def core_table(title: str, runs: Sequence[Path], split: str, data: str) -> Table:
    """The core metrics of each run."""
    rows = []
    for run in map(Run, runs):
        found = [row for row in read_rows(run.folder, data=data) if row["split"] == split and row["part"] == CORE]
        made, k = run.cfg, "–" if run.cfg["k"] is None else f"{run.cfg['k']:g}"
        rows.append([run.name, made["backbone"], f"{k} of {made['d_in']}", *(column.cell(found) for column in SHOWN)])
    heads = [Head("run"), Head("backbone", drop=1), Head("k of d_in", drop=1), *(c.head for c in SHOWN)]
    return Table(CORE, title, heads, rows)


def score_table(title: str, columns: Sequence[Column], runs: Sequence[Path], split: str, data: str) -> Table:
    """The ``columns`` of each run, with why one has no number."""
    rows = []
    for run in map(Run, runs):
        found = read_rows(run.folder, strict=True, data=data, protocol=None)
        scores = [row for row in found if row["split"] == split]
        cells: list[object] = [run.name, run.cfg["backbone"]]
        rows.append([*cells, *(column.cell(scores) for column in columns)])
    heads = [Head("run"), Head("backbone", drop=1), *(column.head for column in columns)]
    return Table("scores", title, heads, rows)
