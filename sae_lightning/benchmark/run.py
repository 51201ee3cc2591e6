"""From the config of ``evaluate.py`` to scored runs, in one process or several."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from omegaconf import DictConfig

from sae_lightning.benchmark.evaluate import finished_runs, stored_scores
from sae_lightning.benchmark.job import Settings
from sae_lightning.benchmark.ranks import Ranks, ranks
from sae_lightning.benchmark.similarity import similarity_of
from sae_lightning.benchmark.suite import evaluate_runs
from sae_lightning.kernels.build import lend_cache
from sae_lightning.training.launch import launch_ranks


def settings_of(cfg: DictConfig, alone: Ranks) -> Settings:
    """What the config says of how to score."""
    return Settings(
        cfg.metrics, cfg.split, similarity_of(cfg), cfg.batch_tokens, cfg.memory_gb, cfg.checkpoint_minutes, cfg.again,
        alone.device(cfg.device), cfg.latents_shown,
    )  # fmt: skip


def evaluate(cfg: DictConfig) -> list[Path]:
    """Score the finished runs that ``cfg.runs`` names, where something is missing; returns them.

    With ``cfg.devices`` above 1 further processes do the work. FileNotFoundError when no run matches; StoreError,
    DataError, BackboneError or ValueError with a sentence for what cannot be done.
    """
    lend_cache(Path(cfg.paths.runs))
    runs = finished_runs(cfg.runs, Path(cfg.paths.runs))
    if cfg.devices > 1:
        with tempfile.TemporaryDirectory() as folder:
            # interpolations of judges and data sets are those of each run's config
            launch_ranks(cfg, Path(folder), _evaluate_rank, cfg.devices, resolve=False)
        return runs
    with ranks() as here:
        evaluate_runs(runs, settings_of(cfg, here), here)
    return runs


def scored(cfg: DictConfig) -> list[Path]:
    """The runs that ``cfg.runs`` names and that have scores on ``cfg.split``."""
    runs = finished_runs(cfg.runs, Path(cfg.paths.runs))
    return [run for run in runs if stored_scores(run, cfg.split, []) is not None]


def _evaluate_rank(cfg: DictConfig, _: Path) -> None:
    """One of several processes."""
    cfg.devices = 1
    try:
        evaluate(cfg)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
