"""A run's name: the hash of what determines its result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

TRAINER_KEYS = ("max_epochs", "max_steps", "precision", "gradient_clip_val", "gradient_clip_algorithm")
SECTIONS = ("data", "backbone", "sae", "loss", "loss_options", "optimizer", "schedule", "init", "resample", "subset")
SCALARS = ("expansion", "k", "seed", "batch_size", "dead_after", "normalize", "features")
MONOLOSS = "monoloss"  # of the callbacks
STREAM_KEYS = ("unit", "buffer_mb", "block_mb", "lanes")  # what the order of the features depends on


def identity(cfg: DictConfig) -> dict[str, Any]:
    """The part of the config that determines the SAE: not where things lie, nor loggers, nor the number of devices."""
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    kept = {key: plain.get(key) for key in (*SECTIONS, *SCALARS)}
    if not uses_k(plain["sae"]):
        del kept["k"]
    kept["extract"] = {key: plain["extract"].get(key) for key in ("precision", "dtype")}
    kept["stream"] = {key: plain["stream"].get(key) for key in STREAM_KEYS}
    if cfg.get("d_sae") is not None:
        kept["d_sae"], kept["expansion"] = cfg.d_sae, None
    if loss_callbacks(cfg):
        kept["callbacks"] = {name: _numbers(plain["callbacks"][name]) for name in loss_callbacks(cfg)}
    kept["trainer"] = {key: plain["trainer"].get(key) for key in TRAINER_KEYS}
    return kept


def uses_k(sae: Any) -> bool:
    """Whether k matters to the config section ``sae``: as the variant's own setting, or as the L0 it is steered to."""
    return "k" in sae["settings"] or sae.get("target_l0") is not None


def _numbers(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with whole floats as ints: a weight of 1 is one of 1.0."""
    return {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in entry.items()}


def callbacks_on(cfg: Mapping[str, Any] | DictConfig) -> list[str]:
    """The callbacks that are switched on, sorted: entries with a ``_target_`` whose weight, if any, is not 0."""
    entries = (cfg.get("callbacks") or {}).items()
    return sorted(str(name) for name, e in entries if e is not None and "_target_" in e and e.get("weight") != 0)


def loss_callbacks(cfg: DictConfig) -> list[str]:
    """Those that add to the loss, which have a weight; others are taken not to change the result."""
    return [name for name in callbacks_on(cfg) if "weight" in cfg.callbacks[name]]


def monoloss_of(config: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """The weight of MonoLoss in a run's config and its other options; 0 and none for a run without it.

    An entry without ``_target_`` is one that was given settings but not switched on (``callbacks=default``).
    """
    entry = (config.get("callbacks") or {}).get(MONOLOSS)
    if not entry or "_target_" not in entry or not entry.get("weight"):
        return 0.0, {}
    return float(entry["weight"]), {k: v for k, v in entry.items() if k not in ("_target_", "weight")}


def run_hash(cfg: DictConfig) -> str:
    """Eight hex digits of the identity's SHA-256."""
    return short_hash(identity(cfg))


def short_hash(what: dict[str, Any]) -> str:
    """Eight hex digits of the SHA-256 of ``what`` as JSON."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]


def run_name(cfg: DictConfig) -> str:
    """For example ``batchtopk-dinov2-x8-k16-s42-1a2b3c4d``, with features that are not patch tokens, and callbacks."""
    k = f"-k{cfg.k}" if uses_k(cfg.sae) else ""
    kind = "" if cfg.features == "patch" else f"-{cfg.features}"
    extra = "".join(f"-{name}" for name in loss_callbacks(cfg))
    size = f"x{cfg.expansion}" if cfg.get("d_sae") is None else f"d{cfg.d_sae}"
    return f"{cfg.sae.name}-{cfg.backbone.name}{kind}-{size}{k}{extra}-s{cfg.seed}-{run_hash(cfg)}"
