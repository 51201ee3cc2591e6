"""The experiment logger that the config names; ``history.csv`` is written beside any of them."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from urllib.parse import urlparse

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from omegaconf import DictConfig, OmegaConf

KINDS = ("none", "csv", "tensorboard", "wandb")


def build_logger(cfg: DictConfig, folder: Path) -> Logger | bool:
    """A Lightning logger writing below ``folder``, or False for ``none``; ValueError for an unknown kind."""
    kind = cfg.logger.kind
    if kind not in KINDS:
        raise ValueError(f"Unknown logger.kind={kind}; choose one of {', '.join(KINDS)}.")
    if kind == "csv":
        return CSVLogger(folder, name="csv", version="")
    if kind == "tensorboard":
        return TensorBoardLogger(folder, name="tensorboard", version="")
    if kind == "wandb":
        return _wandb(cfg, folder)
    return False


def _wandb(cfg: DictConfig, folder: Path) -> Logger:
    offline = cfg.logger.offline
    if offline == "auto":
        offline = not has_login()
        if offline:
            print(f"No W&B login found: logging offline; upload later with `wandb sync {folder}/wandb`.", flush=True)
    return WandbLogger(
        name=folder.name,
        save_dir=folder,
        project=cfg.logger.project,
        entity=cfg.logger.entity,
        group=cfg.logger.group,
        offline=bool(offline),
        config=OmegaConf.to_container(cfg, resolve=True),
    )


def has_login() -> bool:
    """Whether W&B has credentials: an API key in the environment, or one stored for its host by ``wandb login``."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    host = urlparse(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
