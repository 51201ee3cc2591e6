"""The experiment loggers that the config names; ``history.csv`` is written beside any of them."""

from __future__ import annotations

import csv
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from sae_lightning.files import set_aside
from sae_lightning.runs.identity import callbacks_on, monoloss_of
from sae_lightning.training.wandb_run import WandbRun, open_run

LEFT_OUT = ("logger", "paths", "name", "pack", "checkpoint")  # do not change the result

FIRST = ("data", "features", "layer", "variant", "expansion", "k", "seed", "d_in", "d_sae", "hash")


def columns(made: Mapping[str, Any]) -> dict[str, Any]:
    """``cfg.json`` of a run, ``made``, as scalars: run, backbone, layer, variant, expansion, k, … then the config.

    ``backbone`` is its short name and ``title`` says its size; ``monoloss`` is the weight, 0 without. Settings below a
    section are joined by slashes, lists are JSON, and what is not set, or of a callback that is not on, is left out.
    """
    entries = made["config"].get("callbacks") or {}
    config = {**made["config"], "callbacks": {name: entries[name] for name in callbacks_on(made["config"])}}
    found = {
        "run": made["name"], "backbone": config["backbone"]["name"], "title": made["backbone"],
        "monoloss": monoloss_of(config)[0],
        **{name: made.get(name) for name in FIRST},
    }  # fmt: skip
    found |= {name: value for name, value in flat(config) if name not in found}
    return {name: value for name, value in found.items() if value is not None}


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested settings by their slashed names."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}/") if prefix or name not in LEFT_OUT else ()
        elif prefix or name not in LEFT_OUT:
            yield f"{prefix}{name}", json.dumps(list(value)) if isinstance(value, list | tuple) else value


KINDS = ("csv", "tensorboard", "wandb")

FINAL = ("val/explained_variance", "val/fvu", "val/cosine", "val/l0", "val/dead_share")

TESTED = ("test/explained_variance", "test/fvu", "test/monoscore", *(f"test/M{i}" for i in range(1, 8)))


def check_loggers(cfg: DictConfig) -> None:
    """ValueError for a logger that does not exist."""
    for kind in cfg.logger or ():
        if kind not in KINDS:
            raise ValueError(f"Unknown logger.{kind}; choose among {', '.join(KINDS)}, or logger=none.")


def open_loggers(cfg: DictConfig, folder: Path, made: Mapping[str, Any] | None = None, start: int = 0) -> list[Logger]:
    """Lightning loggers writing below ``folder``, one for each entry of ``cfg.logger``; none on ranks but the first.

    All get the same metrics at the same steps, and the ``columns`` of ``made``, what ``cfg.json`` will hold (by default
    the settings of ``cfg``). A training that resumes at step ``start`` replaces what was logged from there on.
    ValueError for an unknown logger.
    """
    check_loggers(cfg)
    if not cfg.logger or getattr(rank_zero_only, "rank", 0) not in (None, 0):
        return []
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    about = columns(made) if made is not None else {k: v for k, v in flat(plain) if v is not None}
    loggers: list[Logger] = []
    for kind, options in plain["logger"].items():
        if kind == "csv":
            loggers.append(_csv(folder, about, start))
        elif kind == "tensorboard":
            loggers.append(_tensorboard(folder, about, start))
        else:
            tags = [str(about[name]) for name in ("backbone", "variant", "data") if name in about]
            run = open_run(sweep_of(cfg, options), folder, about, tags)
            if run is not None:
                cfg.logger.wandb.project = run.project  # for evaluate.py, which logs into the same run
                loggers.append(WandbRun(run, folder))
    return loggers


def close_loggers(loggers: Sequence[Logger], cfg: DictConfig, folder: Path, result: Mapping[str, Any]) -> None:
    """End the loggers of a finished training; W&B also gets ``result``'s time and speed, and the SAE if asked to."""
    for logger in loggers:
        if isinstance(logger, WandbRun):
            values = {name: v for name, v in result.items() if isinstance(v, int | float | str)}
            logger.close(values, dict(flat(result)) if cfg.logger.wandb.artefact else None)
        else:
            logger.finalize("success")


def checkpoint_step(path: Path) -> int:
    """The step at which a training that resumes from ``path`` starts; 0 where there is no checkpoint."""
    if not path.is_file():
        return 0
    return int(torch.load(path, map_location="cpu", mmap=True, weights_only=True)["global_step"])


def sweep_of(cfg: DictConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    """W&B's ``options`` with the group, where there is none, and tags that Hydra's sweep gives to all its jobs.

    The group is the experiment's name with the sweep folder's, such as ``visaebench_grid 2025-01-31/12-00-00``.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    made = dict(options)
    if not HydraConfig.initialized():
        return made
    hydra = HydraConfig.get()
    experiment = hydra.runtime.choices.get("experiment")
    made["tags"] = [*dict.fromkeys((*([experiment] if experiment else []), *made["tags"]))]
    if made["group"] is None and hydra.mode == RunMode.MULTIRUN and "WANDB_RUN_GROUP" not in os.environ:
        folder = "/".join(Path(hydra.sweep.dir).parts[-2:])
        made["group"] = f"{experiment} {folder}" if experiment else folder
    return made


def write_sweep_options(cfg: DictConfig) -> None:
    """Write what the sweep gives into the config, for ranks that know nothing of Hydra."""
    if "wandb" in (cfg.logger or {}):
        cfg.logger.wandb = sweep_of(cfg, OmegaConf.to_container(cfg.logger.wandb))  # type: ignore[arg-type]


def _csv(folder: Path, about: Mapping[str, Any], start: int) -> CSVLogger:
    """``csv/metrics.csv`` and ``csv/hparams.yaml``; rows before ``start`` are kept, which Lightning would delete."""
    logger = CSVLogger(folder, name="csv", version="")
    path = folder / "csv" / "metrics.csv"
    rows: list[dict[str, Any]] = []
    if start and path.is_file():
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file) if int(row["step"]) < start]
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            set_aside(path, f"{type(error).__name__}: {error}", "its rows begin anew")
    warnings.filterwarnings("ignore", message=".*Experiment logs directory .* exists and is not empty.*")
    writer = logger.experiment
    writer.metrics = rows
    writer.save()
    logger.log_hyperparams(dict(about))
    logger.save()
    return logger


def _tensorboard(folder: Path, about: Mapping[str, Any], start: int) -> TensorBoardLogger:
    """Event files with the hyper-parameters and the names of the final scores, for the table that compares runs."""
    from torch.utils.tensorboard.summary import hparams

    logger = TensorBoardLogger(
        folder, name="tensorboard", version="", default_hp_metric=False, purge_step=start or None
    )  # fmt: skip
    logger.hparams.update(about)
    writer = logger.experiment._get_file_writer()
    for summary in hparams(dict(about), dict.fromkeys((*FINAL, *TESTED), 0.0)):
        writer.add_summary(summary)
    return logger
