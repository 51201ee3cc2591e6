"""The config of a training, composed without a command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

import sae_lightning.settings.resolvers  # noqa: F401
from sae_lightning.settings.check import check_settings

CONF = Path(__file__).resolve().parents[1] / "conf"


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """What ``train.py`` composes from ``overrides``; Hydra's error or SettingsError for one that cannot be."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        cfg = compose("config", list(overrides))
    check_settings("train", cfg)
    return cfg
