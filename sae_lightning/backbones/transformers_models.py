"""Any plain vision transformer of transformers, alone or as the image half of CLIP and SigLIP."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import nn

from sae_lightning.backbones.base import Backbone
from sae_lightning.backbones.errors import BackboneError
from sae_lightning.backbones.settings import Published, asked_layer, published
from sae_lightning.backbones.transformers_build import architecture, build
from sae_lightning.backbones.transformers_images import image_size_and_transform
from sae_lightning.backbones.transformers_read import model_inputs, read_transformers
from sae_lightning.backbones.transformers_text import TEXT_HALVES, load_text

# the image halves of image–text models, by the whole model's type
IMAGE_HALVES = {"clip": "CLIPVisionModelWithProjection", "siglip": "SiglipVisionModel", "siglip2": "Siglip2VisionModel"}


def load_transformers(cfg: Mapping[str, Any]) -> Backbone:
    """The vision transformer ``cfg.published.model`` of transformers; its layers are the blocks.

    Of CLIP and SigLIP only the image half is loaded; the text half follows when captions ask for it. MAE
    sees all patches, in order. BackboneError for an architecture that is no plain vision transformer, and
    for weights, config or image processor that cannot be had.
    """
    wanted = published(cfg)
    whole = deepcopy(architecture(wanted))
    config = _image_half(wanted, whole)
    depth = config.num_hidden_layers
    if hasattr(config, "mask_ratio"):
        config.mask_ratio = 0.0
    if whole is not config and hasattr(whole, "projection_dim"):
        config.projection_dim = whole.projection_dim
    model = build(wanted, IMAGE_HALVES.get(whole.model_type, "AutoModel"), config)
    tower, project = model, None
    if whole.model_type == "clip":
        tower, project = model.vision_model, model.visual_projection
    elif whole.model_type in IMAGE_HALVES:
        project = nn.Identity()  # SigLIP's pooled output is its embedding
    size, transform = image_size_and_transform(wanted, config)
    grid = (size // config.patch_size, size // config.patch_size)
    try:
        inspect.signature(tower.forward).bind(**model_inputs(tower, torch.zeros(1, 3, size, size)))
    except TypeError as error:
        raise _unsupported(wanted, config, f"it does not take pictures alone, {error}") from error
    return Backbone(
        tower,
        partial(read_transformers, tower, _blocks(tower, depth), grid),
        name=cfg["name"],
        title=wanted.title,
        depth=depth,
        layer=asked_layer(cfg, "published"),
        image_size=size,
        transform=transform,
        project=project,
        load_text=partial(load_text, wanted, whole) if whole.model_type in TEXT_HALVES else None,
    )


def transformers_depth(wanted: Published) -> int:
    """Number of blocks, from the model's config alone; BackboneError if it is no vision transformer."""
    return _image_half(wanted, architecture(wanted)).num_hidden_layers


def _image_half(wanted: Published, whole: Any) -> Any:
    """The config of the model's image half, or of all of it; BackboneError if it is no plain vision transformer."""
    from transformers import MODEL_MAPPING, PreTrainedConfig

    config = getattr(whole, "vision_config", None)
    config = config if isinstance(config, PreTrainedConfig) else whole
    if not all(isinstance(getattr(config, name, None), int) for name in ("num_hidden_layers", "patch_size")):
        raise _unsupported(wanted, config, "it has no blocks over square patches")
    if any(hasattr(config, name) for name in ("tubelet_size", "num_frames")):
        raise _unsupported(wanted, config, "it takes videos")
    if not (isinstance(getattr(config, "image_size", None), int) or hasattr(config, "num_patches")):
        raise _unsupported(wanted, config, f"its image_size is {getattr(config, 'image_size', None)}")
    if whole.model_type not in IMAGE_HALVES and type(config) not in MODEL_MAPPING:
        raise _unsupported(wanted, config, "transformers' AutoModel cannot load its image half alone")
    return config


def _unsupported(wanted: Published, config: Any, why: str) -> BackboneError:
    return BackboneError(
        f"'{wanted.model}' ({config.model_type}) is no plain vision transformer and not supported: {why}. timm may "
        "have it: try backbone=timm."
    )


def _blocks(model: nn.Module, depth: int) -> list[nn.Module]:
    """The first list of as many modules as the model has blocks."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return list(module)
    raise BackboneError(
        f"{type(model).__name__} has no list of {depth} blocks and is not supported; timm may have it: try "
        "backbone=timm."
    )
