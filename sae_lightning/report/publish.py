"""Scores of evaluated runs into the loggers of their trainings: ``python evaluate.py logger=wandb``."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from PIL import Image

from sae_lightning.metrics.part import CORE, PARTS, headlines
from sae_lightning.metrics.protocols import RELEASED
from sae_lightning.report.figures import read_history
from sae_lightning.report.latents import latent_groups, pictures
from sae_lightning.report.page import load_run
from sae_lightning.runs.run import SCORES, TOP_IMAGES, Run
from sae_lightning.runs.scores import TABLE, read_rows
from sae_lightning.saes.artefact import read_cfg
from sae_lightning.training.loggers import check_loggers, columns
from sae_lightning.training.wandb_run import STEP, WandbRun, finish, log_artefact, open_run

GOALS = {  # which way is better, of what runs are compared by
    "val/explained_variance": "maximize", "val/cosine": "maximize", "val/fvu": "minimize",
    "val/dead_share": "minimize", "train/loss": "minimize", "loss/*": "minimize",
    **{f"test/{c.metric}": "maximize" if c.better else "minimize" for c in PARTS[CORE].columns if c.better is not None},
    **{f"test/{c.headline}": "maximize" if c.better else "minimize" for c in headlines()},
    **{f"test/{RELEASED}/{c.headline}": "maximize" if c.better else "minimize" for c in headlines(RELEASED)},
}  # fmt: skip


def scores_of(run: Path) -> dict[str, float]:
    """``test/fvu`` and the other core metrics of ``scores.json``, and ``test/M1`` … ``test/M7`` where there are some;
    by the released package ``test/released/M1`` ….

    The prefix is the split that was scored.
    """
    scores = Run(run).scores
    split = scores["split"]
    found = {f"{split}/{name}": float(value) for name, value in scores["metrics"].items()}
    rows = [row for row in read_rows(run, protocol=None) if row["split"] == split]
    found |= {f"{split}/{c.headline}": c.of(rows) for c in headlines()}
    found |= {f"{split}/{RELEASED}/{c.headline}": c.of(rows) for c in headlines(RELEASED)}
    return {name: value for name, value in found.items() if value == value}


def trained(run: Path) -> dict[str, Any]:
    """What a finished training says of itself: ``seconds``, ``steps``, … and ``val/…``."""
    result = Run(run).result
    val = {f"val/{name}": value for name, value in result["val"].items()}
    return {name: value for name, value in result.items() if isinstance(value, int | float | str)} | val


def history_rows(run: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """The rows of ``history.csv`` at the steps at which loggers count them, which begin with 0."""
    for step, row in read_history(run).iterrows():
        yield int(str(step)) - 1, {str(name): float(value) for name, value in row.dropna().items()}


def latent_cards(run: Path, count: int) -> list[dict[str, Any]]:
    """About ``count`` of the latents that ``evaluate.py`` chose to show, equally many of each group, a dict each.

    ``plain`` and ``lit`` are strips of the top images, without and with the patches' activation. Empty where the run's
    images cannot be read again: a bare store, or a stream. StoreError or DataError when they have changed or are gone.
    """
    about = load_run(run)
    images = pictures(about)
    if images is None or count < 1:
        return []
    groups = latent_groups(about, images, n_cards=-(-count // 6))
    return [
        {"group": group["name"], **card, "plain": _picture(card["plain"]), "lit": _picture(card["lit"])}
        for group in groups for card in group["cards"]
    ]  # fmt: skip


def sheet(strips: list[Image.Image], gap: int = 4) -> Image.Image:
    """Strips below each other, on white."""
    size = (max(s.width for s in strips), sum(s.height + gap for s in strips) - gap)
    whole, at = Image.new("RGB", size, "white"), 0
    for strip in strips:
        whole.paste(strip, (0, at), strip if strip.mode == "RGBA" else None)
        at += strip.height + gap
    return whole


def _picture(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).convert("RGBA")


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
