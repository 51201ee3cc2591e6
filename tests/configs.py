"""Configs as Hydra composes them, but each choice of groups once: that takes most of the 0.1 s that a config takes."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

CONF = Path(__file__).resolve().parents[1] / "conf"


def composed(name: str, *overrides: str) -> DictConfig:
    """What ``compose(name, overrides)`` gives; settings are written into a copy of their groups' config by Hydra."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    groups = [override for override in parsed if _composes(override)]
    cfg = deepcopy(_of_groups(name, *(str(override.input_line) for override in groups)))
    ConfigLoaderImpl._apply_overrides_to_config([override for override in parsed if override not in groups], cfg)
    return cfg


@cache
def _of_groups(name: str, *groups: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(groups))


def _composes(override: Override) -> bool:
    """Whether it chooses a group's file, or is for Hydra itself or of several values, which Hydra is to see."""
    return (
        (CONF / override.key_or_group).is_dir() or override.package is not None or override.is_hydra_override()
        or override.is_sweep_override()
    )  # fmt: skip
