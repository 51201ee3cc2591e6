"""What ``evaluate.py`` prints at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from sae_lightning.metrics.part import HEADLINES, fits, headline
from sae_lightning.rendering.table import Head, Table, Unknown
from sae_lightning.runs.run import Run

HEADS = {  # how tables show the core metrics
    "explained_variance": Head("expl. var.", better=True),
    "r2": Head("R²", better=True, about="mean coefficient of determination of the dimensions"),
    "fvu": Head("FVU", better=False),
    "l0": Head("L0", ".1f"),
    "dead_share": Head("dead", ".1%", better=False),
    "cosine": Head("cosine", better=True),
    "decoder_cosine": Head("|cos| dec.", better=False, about="mean |cosine| between decoder rows"),
    "decoder_nearest_cosine": Head(
        "nearest dec.", better=False, about="mean largest cosine of a decoder row with another"
    ),
    "monoscore": Head(
        "MonoScore", better=True, about="mean over all latents of the activation-weighted similarity of image pairs"
    ),
    "purity": Head(
        "purity", better=True, about="share of a latent's dominant class among the images it fires on, mean over "
        "latents that fire"),
    "weighted_purity": Head("weighted", better=True, about="the same, each image weighted by its activation"),
    "top_purity": Head(
        "top-9 purity", better=True, about="share of the most common class among a latent's top 9 images, mean over "
        "latents active on at least 10 images"),
}  # fmt: skip


def print_scores(runs: Sequence[Path], cfg: DictConfig) -> None:
    """The tables of ``runs``, and the baselines of those who judged how alike images are."""
    core_table(runs, cfg.split).show()
    if cfg.metrics.get("sparse_probing") is not None:
        visaebench_table(runs, cfg.split).show()
    judges = {(s["title"], s["baseline"]) for s in (Run(run).scores["similarity"] for run in runs)}
    for title, baseline in sorted(judges):
        print(f"MonoScore by {title}; all pairs of images: {baseline:.3f}.")


def core_table(runs: Sequence[Path], split: str) -> Table:
    """The core metrics of each run."""
    rows = []
    for run in map(Run, runs):
        made, metrics = run.cfg, run.scores["metrics"]
        k = "–" if made["k"] is None else f"{made['k']:g}"
        rows.append([run.name, made["backbone"], f"{k} of {made['d_in']}", *(metrics.get(name) for name in HEADS)])
    heads = [Head("run"), Head("backbone"), Head("k of d_in"), *HEADS.values()]
    return Table("core", f"Scores on the {split} split", heads, rows)


def visaebench_table(runs: Sequence[Path], split: str) -> Table:
    """M1–M7 of each run, with why one has no number."""
    rows: list[list[object]] = []
    for run in map(Run, runs):
        scores = [row for row in run.rows if row["split"] == split]
        cells: list[object] = [run.name, run.cfg["backbone"]]
        for h in HEADLINES:
            why = next((r.get("why") for r in scores if r["metric"] == h.metric and fits(r["setting"], h.setting)), "")
            value = headline(scores, h)
            cells.append(value if math.isfinite(value) else Unknown(why or ""))
        rows.append(cells)
    heads = [Head("run"), Head("backbone"), *(Head(h.title, better=h.better) for h in HEADLINES)]
    return Table("visaebench", f"ViSAEBench on the {split} split", heads, rows)
