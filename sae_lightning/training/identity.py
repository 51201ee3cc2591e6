"""A run's name: the hash of what determines its result."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

TRAINER_KEYS = ("max_epochs", "max_steps", "precision", "gradient_clip_val", "gradient_clip_algorithm")
SECTIONS = ("data", "backbone", "sae", "loss", "loss_options", "optimizer", "schedule", "init", "resample", "subset")
SCALARS = ("expansion", "k", "seed", "batch_size", "dead_after", "normalize", "features")
STREAM_KEYS = ("unit", "buffer_mb", "block_mb", "lanes")  # what the order of the features depends on


def identity(cfg: DictConfig) -> dict[str, Any]:
    """The part of the config that determines the SAE: not where things lie, nor loggers, nor the number of devices."""
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    kept = {key: plain.get(key) for key in (*SECTIONS, *SCALARS)}
    if not uses_k(plain["sae"]):
        del kept["k"]
    kept["extract"] = {key: plain["extract"].get(key) for key in ("precision", "dtype")}
    kept["stream"] = {key: plain["stream"].get(key) for key in STREAM_KEYS}
    kept["trainer"] = {key: plain["trainer"].get(key) for key in TRAINER_KEYS}
    return kept


def uses_k(sae: Any) -> bool:
    """Whether k matters to the config section ``sae``: as the variant's own setting, or as the L0 it is steered to."""
    return "k" in sae["settings"] or sae.get("target_l0") is not None


def run_hash(cfg: DictConfig) -> str:
    """Eight hex digits of the identity's SHA-256."""
    return hashlib.sha256(json.dumps(identity(cfg), sort_keys=True).encode()).hexdigest()[:8]


def run_name(cfg: DictConfig) -> str:
    """For example ``batchtopk-dinov2-x8-k16-s42-1a2b3c4d``; names features that are not patch tokens, no k if none."""
    k = f"-k{cfg.k}" if uses_k(cfg.sae) else ""
    kind = "" if cfg.features == "patch" else f"-{cfg.features}"
    return f"{cfg.sae.name}-{cfg.backbone.name}{kind}-x{cfg.expansion}{k}-s{cfg.seed}-{run_hash(cfg)}"
