"""A fine-tuned classifier on disk: ``model.safetensors`` and ``cfg.json``, complete without hub or pretrained files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file

from sae_lightning.finetuning.build import build
from sae_lightning.finetuning.classifier import Classifier
from sae_lightning.finetuning.errors import FinetuneError
from sae_lightning.finetuning.preprocess import Preprocess
from sae_lightning.saes.artefact import unwrapped, write_json, write_tensors

SCHEMA = 1
WEIGHTS = "model.safetensors"


class Loaded(NamedTuple):
    """A classifier in evaluation mode on the CPU, how pictures go into it, and its ``cfg.json``."""

    classifier: Classifier
    preprocess: Preprocess
    cfg: dict[str, Any]


def save(
    classifier: Classifier, preprocess: Preprocess, folder: Path, model: dict[str, Any], class_names: list[str],
    record: dict[str, Any],
) -> None:  # fmt: skip
    """Write ``cfg.json`` with ``record`` and with what rebuilds the classifier (``build.rebuilding``), then weights."""
    made = {
        "schema": SCHEMA, "model": model, "layer": classifier.layer, "n_units": classifier.n_units,
        "added_layer": "added.weight" in classifier.state_dict(), "class_names": class_names,
        "preprocess": preprocess.to_dict(),
    }  # fmt: skip
    write_json(folder / "cfg.json", made | record)
    write_tensors(folder / WEIGHTS, dict(classifier.state_dict()))


def load(folder: Path) -> Loaded:
    """What ``save`` wrote in ``folder``; FinetuneError when it is not there, is broken or does not fit."""
    try:
        cfg = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
        tensors = unwrapped(load_file(folder / WEIGHTS))
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise FinetuneError(f"{folder} holds no whole fine-tuned model ({error}); run finetune.py again.") from error
    if cfg.get("schema") != SCHEMA:
        raise FinetuneError(f"{folder}/cfg.json has schema {cfg.get('schema')}; this version reads {SCHEMA}.")
    classifier, _ = build(cfg["model"], len(cfg["class_names"]), cfg["layer"], cfg["added_layer"])
    try:
        classifier.load_state_dict(tensors)
    except RuntimeError as error:
        raise FinetuneError(f"{folder}/{WEIGHTS} does not fit its cfg.json: {error}") from error
    return Loaded(classifier.eval(), Preprocess.from_dict(cfg["preprocess"]), cfg)
