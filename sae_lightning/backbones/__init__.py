"""Vision encoders: the bundled tiny ones and any of timm and transformers, behind one interface."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sae_lightning.backbones.base import Backbone
from sae_lightning.backbones.bundled import load_tiny, tiny_identity
from sae_lightning.backbones.errors import BackboneError
from sae_lightning.backbones.layers import default_layer
from sae_lightning.backbones.settings import check_size, published
from sae_lightning.backbones.taps import KINDS, Tap
from sae_lightning.backbones.timm_models import load_timm
from sae_lightning.backbones.transformers_models import load_transformers
from sae_lightning.backbones.weights import digest
from sae_lightning.settings.resolvers import folder_name


def load_backbone(cfg: Mapping[str, Any]) -> Backbone:
    """The backbone of the config node ``cfg``: ``size`` tiny or published, the latter by ``published.library``.

    Raises BackboneError with a sentence for settings that are unknown or contradict each other, and for
    weights that cannot be had.
    """
    if check_size(cfg["size"]) == "tiny":
        return load_tiny(cfg)
    return load_timm(cfg) if published(cfg).library == "timm" else load_transformers(cfg)


def identity(cfg: Mapping[str, Any]) -> str:
    """What determines the backbone's features, without loading it: the model's id, or its weights' digest."""
    if check_size(cfg["size"]) == "tiny":
        return tiny_identity(cfg)
    wanted = published(cfg)
    parts = [wanted.library, wanted.model, str(wanted.image_size)]
    if wanted.weights is not None:
        parts.append(digest(wanted.weights))
    if not wanted.pretrained:
        parts += ["random", *([json.dumps(wanted.architecture, sort_keys=True)] if wanted.architecture else [])]
    return ":".join(parts)


__all__ = ["KINDS", "Backbone", "BackboneError", "Tap", "default_layer", "folder_name", "identity", "load_backbone"]
