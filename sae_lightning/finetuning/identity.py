"""A fine-tuning's name: the hash of what determines the classifier and its scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sae_lightning.backbones import identity as backbone_identity
from sae_lightning.features.ensure import images_fingerprint, plain, tap_of
from sae_lightning.features.store import FeatureStore
from sae_lightning.finetuning.build import model_identity
from sae_lightning.training.identity import (
    EXTRACT_LEFT_OUT,
    LISTENED,
    PLACE,
    READ,
    SHOWN,
    TRAINER_ABSENT,
    TRAINER_LEFT_OUT,
    clipping,
)
from sae_lightning.training.leaves import Rules, short_hash

SCHEMA = 1  # of what ``identity`` says, as in training/identity.py

LEFT_OUT = {
    "data.*": "counted by the fingerprints of the images",
    **dict.fromkeys(
        (
            "model.library", "model.model", "model.image_size", "model.pretrained", "model.weights",
            "model.architecture*",
        ),
        "counted by the model's own fingerprint",
    ),
    **dict.fromkeys(
        ("model.lr.*", "model.weight_decay", "model.schedule", "model.warmup_epochs.*"),
        "counted where it is used: in optimizer and schedule",
    ),
    "model.name": "what the model is called",
    "similarity.*": "counted by the encoder's own fingerprint, with the layer that it means",
    "similarity_store.*": "counted by the stores' fingerprints",
    "recipe": "counted where it is used: optimizer.lr and schedule.warmup_epochs",
    "num_workers": READ, "checkpoint.*": SHOWN, "logger.*": SHOWN, "logger": SHOWN, "paths.*": PLACE,
    **{f"extract.{name}": reason for name, reason in EXTRACT_LEFT_OUT.items()}, **TRAINER_LEFT_OUT,
}  # fmt: skip
ABSENT = {
    "extract.precision": "32", "extract.dtype": "float16", "extract.unreadable": "refuse", "features": "embedding",
    "optimizer.momentum": 0.9, "model.lora.dropout": 0, **TRAINER_ABSENT,
    "trainer.sync_batchnorm": None,  # with several GPUs
}  # fmt: skip


def idle(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Patterns of leaves that nothing reads beside the others, with reasons."""
    found = (
        {}
        if leaves.get("model.lora.r") is not None
        else dict.fromkeys(("model.lora.alpha", "model.lora.targets", "model.lora.dropout"), "all weights are trained")
    )
    held_out = leaves.get("held_out")
    if all(leaves.get(f"similarity_store.{split}") is not None for split in ("train", held_out)):
        found |= dict.fromkeys(("extract.*", "features"), "the stores are there")
    return found | clipping(leaves)


RULES = Rules(LEFT_OUT, LISTENED | {"validate": "what is scored on the way, which no callback hears"}, ABSENT, idle)


def identity(cfg: DictConfig, seen: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What determines the classifier and its scores, by leaf: the settings that count, and what ``look`` finds.

    Raises DataError, BackboneError, StoreError or FinetuneError where data, encoder or model cannot be found.
    """
    return {"schema": SCHEMA} | RULES.counted(plain(cfg)) | dict(look(cfg) if seen is None else seen)


def look(cfg: DictConfig) -> dict[str, Any]:
    """The fingerprints of the images, the model as it starts, and of what says which images are alike."""
    splits = list(dict.fromkeys(("train", str(cfg.held_out))))
    found: dict[str, Any] = {f"data.{split}": images_fingerprint(cfg, split) for split in splits}
    found["model"] = model_identity(plain(cfg.model))
    encoder = OmegaConf.create({"backbone": plain(cfg.similarity), "features": str(cfg.features)})
    for split in splits:
        given = cfg.similarity_store.get(split)
        if given is not None:
            found[f"similarity.{split}"] = FeatureStore.open(given).fingerprint
        else:
            found[f"similarity.{split}"] = [backbone_identity(plain(cfg.similarity)), tap_of(encoder).layer]
    return found


def run_name(cfg: DictConfig, seen: Mapping[str, Any] | None = None) -> str:
    """For example ``deit-tiny-mono0.1-s42-1a2b3c4d``."""
    return f"{cfg.model.name}-mono{float(cfg.mono_weight):g}-s{cfg.seed}-{short_hash(identity(cfg, seen))}"
