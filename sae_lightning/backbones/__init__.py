"""Vision encoders: the bundled tiny ones and the published ones, behind one interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sae_lightning.backbones.base import Backbone, BackboneError, default_layer
from sae_lightning.backbones.bundled import TextTower, file_digest, load_tiny
from sae_lightning.backbones.published import load_timm, load_transformers


def load_backbone(cfg: Mapping[str, Any], pretrained: bool = True) -> Backbone:
    """The backbone of the config node ``cfg``: ``size`` tiny or published, the latter by ``published.library``.

    Raises BackboneError with a sentence for an unknown size or library, and for weights that cannot be had.
    """
    if cfg["size"] == "tiny":
        return load_tiny(cfg, pretrained)
    if cfg["size"] != "published":
        raise BackboneError(f"Unknown backbone.size={cfg['size']}; choose tiny or published.")
    library = cfg["published"]["library"]
    if library == "timm":
        return load_timm(cfg, pretrained)
    if library == "transformers":
        return load_transformers(cfg, pretrained)
    raise BackboneError(f"Unknown backbone.published.library={library}; choose timm or transformers.")


def identity(cfg: Mapping[str, Any]) -> str:
    """What determines the backbone's features, without loading it: the weights' digest or the model's id."""
    if cfg["size"] == "tiny":
        return f"tiny:{cfg['name']}:{file_digest(cfg['name'])}"
    wanted = cfg["published"]
    return f"{wanted['library']}:{wanted['model']}:{wanted['image_size']}"


__all__ = ["Backbone", "BackboneError", "TextTower", "default_layer", "identity", "load_backbone"]
