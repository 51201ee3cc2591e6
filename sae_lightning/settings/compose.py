"""The config of a command, composed without a command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

import sae_lightning.settings.resolvers  # noqa: F401
from sae_lightning.settings.check import check_settings

CONF = Path(__file__).resolve().parents[1] / "conf"


def compose_config(
    overrides: Sequence[str], name: str = "config", values: Mapping[str, Any] | None = None
) -> DictConfig:
    """What a command composes from ``overrides`` and ``values`` by dotted name; Hydra's error or SettingsError."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(name, list(overrides))
    with open_dict(cfg):
        for key, value in (values or {}).items():
            OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    check_settings("train" if name == "config" else name, cfg)
    return cfg
