"""Composed configs as a command gets them, quickly: what is typed is put into a copy of the command's own."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict

CONF = Path(__file__).resolve().parents[2] / "conf"
GROUPS = ("sae", "data", "metrics", "app", "callbacks", "backbone", "logger", "finetune_model", "experiment")


@cache
def composed(command: str, *groups: str) -> DictConfig:
    """The config of ``command`` with these choices."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config" if command == "train" else command, list(groups))


def typed(command: str, *words: str) -> tuple[DictConfig, SimpleNamespace]:
    """The config after ``words`` (group=choice, setting=value), and what the check reads of Hydra's section."""
    groups = [word for word in words if word.split("@")[0].split("=")[0] in GROUPS]
    cfg = copy.deepcopy(composed(command, *groups))
    with open_dict(cfg):
        for word in words:
            if word not in groups:
                key, _, value = word.lstrip("+").partition("=")
                parsed = value if value.startswith("${") else OmegaConf.create(yaml.safe_load(f"x: {value}")).x
                OmegaConf.update(cfg, key, parsed, force_add=True)
    return cfg, SimpleNamespace(
        overrides=SimpleNamespace(task=list(words)), runtime=SimpleNamespace(choices={}), sweeper={}
    )
