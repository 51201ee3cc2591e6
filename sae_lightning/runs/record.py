"""What a run's ``cfg.json`` says beside the SAE itself, of one trained here or imported."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sae_lightning.runs.identity import level_of, short_hash

FIGURES = ("explained_variance", "l0", "dead_share")  # that an SAE is known by

VERSIONS = ("torch", "lightning", "timm", "transformers", "numpy")


def versions(*packages: str) -> dict[str, str]:
    """Python's version and those of ``packages``, for cfg.json."""
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def record(cfg: DictConfig, name: str, made: Mapping[str, Any], d_in: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the run ``name`` of ``cfg``, whose identity is ``made``, on features of width ``d_in``.

    ``facts`` are of the features: ``backbone``, ``layer``, ``data``, ``features``, ``site``, ``severity``, and the
    fingerprints of the ``store`` of each split.
    """
    return {
        "name": name, "hash": short_hash(made), "identity": dict(made), "k": level_of(cfg.sae),
        "expansion": cfg.expansion if cfg.d_sae is None else round(cfg.d_sae / d_in, 2), "seed": cfg.seed, **facts,
        "versions": versions(*VERSIONS), "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "config": OmegaConf.to_container(cfg, resolve=True),
    }  # fmt: skip
