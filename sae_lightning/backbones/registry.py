"""Vision encoders: the bundled tiny ones and any of timm and transformers, behind one interface."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from sae_lightning.backbones.backbone import KINDS, Backbone, BackboneError, Tap, backbone_library
from sae_lightning.backbones.settings import LIBRARIES, asked_layer, check_size, digest, published
from sae_lightning.backbones.tiny import DEPTH, load_tiny, tiny_identity
from sae_lightning.settings.resolvers import folder_name


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
    return _library(wanted.library).depth(wanted)


def _library(name: str) -> Any:
    if name in LIBRARIES:
        import_module(
            f"sae_lightning.backbones.{name}"
        )  # here, as it takes seconds, which names of runs need not wait for
    return backbone_library[name]


def load_backbone(cfg: Mapping[str, Any]) -> Backbone:
    """The backbone of the config node ``cfg``: ``size`` tiny or published, the latter by ``published.library``.

    Raises BackboneError with a sentence for settings that are unknown or contradict each other, and for
    weights that cannot be had.
    """
    if check_size(cfg["size"]) == "tiny":
        return load_tiny(cfg)
    return _library(published(cfg).library).load(cfg)


def identity(cfg: Mapping[str, Any]) -> str:
    """What determines the backbone's features, without loading it: the model's id, or its weights' digest."""
    if check_size(cfg["size"]) == "tiny":
        return tiny_identity(cfg)
    wanted = published(cfg)
    parts = [wanted.library, wanted.model, str(wanted.image_size)]
    if wanted.weights is not None:
        parts.append(digest(wanted.weights))
    if wanted.resize is not None:
        parts.append(f"resize {wanted.resize}")
    if not wanted.pretrained:
        parts += ["random", *([json.dumps(wanted.architecture, sort_keys=True)] if wanted.architecture else [])]
    return ":".join(parts)


__all__ = ["KINDS", "Backbone", "BackboneError", "Tap", "default_layer", "folder_name", "identity", "load_backbone"]
