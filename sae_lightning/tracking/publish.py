"""Scores of evaluated runs into the loggers of their trainings: ``python evaluate.py logger=wandb``."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sae_lightning.benchmark.latents import TOP_IMAGES
from sae_lightning.benchmark.summary import SCORES
from sae_lightning.benchmark.table import TABLE, read_rows
from sae_lightning.saes.artefact import read_cfg
from sae_lightning.tracking.pictures import latent_cards, sheet
from sae_lightning.tracking.scores import history_rows, scores_of, trained
from sae_lightning.training.columns import columns
from sae_lightning.training.loggers import check_loggers
from sae_lightning.training.wandb_run import STEP, WandbRun, finish, log_artefact, open_run

LATENT_COLUMNS = ("group", "latent", "top images", "where it fires", "moran", "top-9 purity", "share", "fired", "peak")
CARD_KEYS = ("group", "latent", "plain", "lit", "moran", "makeup", "share", "fired", "peak")
LATENTS_IN_TENSORBOARD = 24


def publish(runs: Sequence[Path], cfg: DictConfig) -> None:
    """Log the scores of ``runs`` with each of ``cfg.logger``; those logged before, with the same, are left out.

    W&B gets them as summary values of the training's run with a table of latents and one of all scores; of a training
    without W&B also its settings and history. TensorBoard gets scalars at the last step and pictures, csv one row.
    With ``cfg.again`` everything is logged anew. ValueError for an unknown logger.
    """
    check_loggers(cfg)
    plain: Any = OmegaConf.to_container(cfg.logger, resolve=True) if cfg.logger else {}
    for kind, options in plain.items():
        for run in runs:
            marker = run / kind / "published"
            digest = _digest(run, options or {})
            if not cfg.get("again") and marker.is_file() and marker.read_text(encoding="utf-8") == digest:
                continue
            if {"csv": _to_csv, "tensorboard": _to_tensorboard, "wandb": _to_wandb}[kind](run, options or {}):
                marker.parent.mkdir(exist_ok=True)
                marker.write_text(digest, encoding="utf-8")


def wandb_options(run: Path, options: dict[str, Any]) -> dict[str, Any]:
    """``options`` with the place where the training logged: its project, entity, group and suffix, if it did."""
    before = (read_cfg(run)["config"].get("logger") or {}).get("wandb") or {}
    kept = {name: before[name] for name in ("project", "entity", "group", "suffix") if before.get(name) is not None}
    return options | kept


def _to_wandb(run: Path, options: dict[str, Any]) -> bool:
    import wandb

    made = read_cfg(run)
    about = columns(made)
    logged_before = any((run / "wandb").glob("*run-*/*.wandb"))
    opened = open_run(
        wandb_options(run, options), run, about, [str(about[name]) for name in ("backbone", "variant", "data")]
    )
    if opened is None:
        return False
    logger, result = WandbRun(opened, run), trained(run)
    try:
        if not logged_before:
            for step, row in history_rows(run):
                logger.log_metrics(row, step)
            if options["artefact"]:
                log_artefact(opened, run, about | result)
        with _files_below(run):
            opened.summary.update(result | scores_of(run))
            columns_shown: Any = ["metric", "setting", "value", "part", "split", "why"]
            rows = [[r[name] for name in columns_shown] for r in read_rows(run)]
            tables = {"scores": wandb.Table(columns=columns_shown, data=rows)}
            cards = _cards(run, options["latents"])
            if cards:
                shown = [[wandb.Image(c[k]) if k in ("plain", "lit") else c[k] for k in CARD_KEYS] for c in cards]
                tables["latents"] = wandb.Table(columns=list(LATENT_COLUMNS), data=shown)
            opened.log({**tables, STEP: result["steps"]}, step=max(result["steps"] + 1, opened.starting_step))
    except Exception as error:  # the scores are in the run's folder; W&B's troubles do not end the others' logging
        print(f"{run.name}: W&B failed ({error}); the scores are in {run / TABLE}.", flush=True)
        finish(opened, 1)
        return False
    finish(opened)
    return True


@contextmanager
def _files_below(run: Path) -> Iterator[None]:
    """Let W&B stage pictures in the run's folder, not in the home folder, so that they can be synced from elsewhere."""
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(run.resolve() / "wandb")
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]


def _to_tensorboard(run: Path, options: dict[str, Any]) -> bool:
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter

    step = trained(run)["steps"]
    with SummaryWriter(run / "tensorboard") as writer:
        for name, value in scores_of(run).items():
            writer.add_scalar(name, value, step)
        cards = _cards(run, LATENTS_IN_TENSORBOARD)
        for group in dict.fromkeys(card["group"] for card in cards):
            strips = [card[k] for card in cards if card["group"] == group for k in ("plain", "lit")]
            writer.add_image(f"latents/{group}", np.asarray(sheet(strips)), step, dataformats="HWC")
    return True


def _to_csv(run: Path, options: dict[str, Any]) -> bool:
    path = run / "csv" / "metrics.csv"
    found, rows = scores_of(run), []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if not any(row.get(name) for name in found)]
    rows.append({"step": trained(run)["steps"], **found})
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*dict.fromkeys(name for row in rows for name in row)])
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)
    return True


def _cards(run: Path, count: int) -> list[dict[str, Any]]:
    """The latents' pictures; none, with a line saying why, where the images cannot be had."""
    try:
        return latent_cards(run, count)
    except (ValueError, OSError) as error:
        print(f"{run.name}: no pictures of latents: {error}", flush=True)
        return []


def _digest(run: Path, options: dict[str, Any]) -> str:
    """What is logged, as a hash."""
    made = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for name in (SCORES, TABLE, TOP_IMAGES):
        if (run / name).is_file():
            made.update((run / name).read_bytes())
    return made.hexdigest()
