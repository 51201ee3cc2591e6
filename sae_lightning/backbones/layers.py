"""Which layer a config means, known before any weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sae_lightning.backbones.errors import BackboneError
from sae_lightning.backbones.settings import asked_layer, check_size, published
from sae_lightning.backbones.timm_models import timm_anatomy
from sae_lightning.backbones.tiny import DEPTH
from sae_lightning.backbones.transformers_models import transformers_depth


def default_layer(cfg: Mapping[str, Any], size: str | None = None) -> int:
    """``cfg.layer``, else the default layer of ``size`` (by default the config's own), counted from 0.

    Only a layer that counts from the end (null is -1) needs the depth: from timm's architecture without
    weights, or from transformers' config. BackboneError where that cannot be had or is not deep enough.
    """
    size = check_size(size or cfg["size"])
    layer = asked_layer(cfg, size)
    if layer >= 0:
        return layer
    depth = _depth(cfg, size)
    if layer < -depth:
        raise BackboneError(
            f"backbone.layer={layer} does not exist: '{cfg['name']}' has {depth} layers, so -{depth} is its first."
        )
    return depth + layer


def _depth(cfg: Mapping[str, Any], size: str) -> int:
    if size == "tiny":
        return DEPTH
    wanted = published(cfg)
    if wanted.library == "timm":
        return timm_anatomy(wanted.model, wanted.image_size).depth
    return transformers_depth(wanted)
