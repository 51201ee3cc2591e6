"""From the config section ``model`` to a classifier and the way pictures go into it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sae_lightning.backbones import BackboneError, identity, load_backbone
from sae_lightning.backbones.settings import published
from sae_lightning.backbones.transformers_build import architecture
from sae_lightning.backbones.weights import fixed_seed
from sae_lightning.finetuning.classifier import Classifier
from sae_lightning.finetuning.errors import FinetuneError
from sae_lightning.finetuning.lora import add_lora
from sae_lightning.finetuning.preprocess import Preprocess

Model = Mapping[str, Any]
LIBRARIES = ("timm", "transformers", "tiny")


def build(
    model: Model, n_classes: int, layer: str = "added", added_layer: bool = True, seed: int = 0
) -> tuple[Classifier, Preprocess]:
    """The classifier of ``model`` in training mode, on the CPU, and its preprocessing; all of it is trainable, or
    with ``model.lora.r`` the adapters, the added layer and the head.

    New weights are drawn from ``seed``. FinetuneError for settings that contradict each other, weights that cannot be
    had, encoders without a pooled output, and a layer that does not exist.
    """
    try:
        backbone = load_backbone(backbone_node(model))
    except BackboneError as error:
        raise _in_our_words(error) from error
    if "pooled" not in backbone.kinds:
        raise FinetuneError(f"model.model={model['model']} has no pooled output to classify; choose another model.")
    encoder, read = backbone.model, backbone._read

    def pool(images: Tensor) -> Tensor:
        pooled = read(images, (), True).pooled
        assert pooled is not None  # its kinds say so
        return pooled

    with fixed_seed(seed):
        if model["lora"]["r"] is None:
            encoder.requires_grad_(True)
        else:
            add_lora(encoder, model["lora"])
        classifier = Classifier(encoder, pool, n_classes, backbone.image_size, layer, added_layer)
    return classifier.train(), Preprocess.of(backbone.transform, backbone.image_size)


def backbone_node(model: Model) -> dict[str, Any]:
    """``model`` as a config node of the backbones; FinetuneError for an unknown library, or files for a tiny one."""
    library = model["library"]
    if library not in LIBRARIES:
        raise FinetuneError(f"Unknown model.library={library}; choose one of {', '.join(LIBRARIES)}.")
    if library == "tiny":
        if model["weights"] is not None or model["image_size"] is not None:
            raise FinetuneError("The bundled tiny models take neither model.weights nor model.image_size.")
        return {"name": model["model"], "size": "tiny", "layer": None, "tiny": {"pretrained": model["pretrained"]}}
    section = {key: model[key] for key in ("library", "model", "image_size", "pretrained", "weights", "architecture")}
    return {"name": model["name"], "size": "published", "layer": None, "published": section | {"title": None}}


def model_identity(model: Model) -> str:
    """What determines the encoder at the start: its id, or its weights' digest. Raises FinetuneError."""
    try:
        return identity(backbone_node(model))
    except BackboneError as error:
        raise _in_our_words(error) from error


def rebuilding(model: Model) -> dict[str, Any]:
    """``model`` so that ``build`` makes the same architecture without any weights, hub or file."""
    node = dict(model) | {"pretrained": False, "weights": None}
    if model["library"] == "transformers":
        node["architecture"] = json.loads(architecture(published(backbone_node(model))).to_json_string(use_diff=False))
    return node


def _in_our_words(error: BackboneError) -> FinetuneError:
    """The backbone's sentence with the names that this config has for its settings."""
    text = str(error).replace("backbone.published.", "model.").replace("backbone=timm", "model.library=timm")
    return FinetuneError(text.replace("data=demo works offline", "finetune_model=tiny works offline"))
