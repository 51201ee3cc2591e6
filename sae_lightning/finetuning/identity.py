"""A fine-tuning's name: the hash of what determines its result."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from sae_lightning.backbones import identity as backbone_identity
from sae_lightning.finetuning.build import model_identity
from sae_lightning.training.identity import TRAINER_KEYS, short_hash

KEYS = (
    "data", "mono_weight", "layer", "added_layer", "epochs", "batch_size", "optimizer", "schedule", "augment", "seed",
    "features", "similarity_store", "held_out",
)  # fmt: skip
UNIMPORTANT = ("backbones", "k", "batch_size", "max_epochs")  # keys of data that only concern SAEs


def identity(cfg: DictConfig) -> dict[str, Any]:
    """The part of the config that determines the classifier and its scores: not paths, loggers or devices."""
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    kept = {key: plain[key] for key in KEYS}
    kept["data"] = {key: value for key, value in plain["data"].items() if key not in UNIMPORTANT}
    kept["model"] = [model_identity(plain["model"]), plain["model"]["lora"]]
    kept["similarity"] = backbone_identity(plain["similarity"])
    kept["extract"] = {key: plain["extract"].get(key) for key in ("precision", "dtype")}
    kept["trainer"] = {key: plain["trainer"].get(key) for key in TRAINER_KEYS}
    return kept


def run_name(cfg: DictConfig) -> str:
    """For example ``deit-tiny-demo-mono0.1-s42-1a2b3c4d``."""
    data = str(cfg.data.name).replace("/", "--")
    return f"{cfg.model.name}-{data}-mono{float(cfg.mono_weight):g}-s{cfg.seed}-{short_hash(identity(cfg))}"
