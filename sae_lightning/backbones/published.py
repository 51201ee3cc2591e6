"""Published encoders through timm or transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from sae_lightning.backbones.base import Backbone, BackboneError, default_layer

NO_WEIGHTS = (
    "The weights of '{model}' cannot be loaded: {error}. Check the model's id and the connection to the model hub; "
    "data=demo works offline."
)


def load_timm(cfg: Mapping[str, Any], pretrained: bool = True) -> Backbone:
    """A timm vision transformer; ``cfg.published`` names ``model``, ``image_size`` and ``layer``."""
    wanted = cfg["published"]
    try:
        model: Any = timm.create_model(
            wanted["model"], pretrained=pretrained, num_classes=0, img_size=wanted["image_size"]
        )
    except Exception as error:
        raise BackboneError(NO_WEIGHTS.format(model=wanted["model"], error=error)) from error
    if not hasattr(model, "blocks") or not hasattr(model, "patch_embed"):
        raise BackboneError(f"'{wanted['model']}' is no vision transformer with blocks and a patch embedding.")
    data = resolve_model_data_config(model)
    data["input_size"] = (3, wanted["image_size"], wanted["image_size"])
    return _backbone(
        cfg, model, "blocks", model.num_prefix_tokens, model.embed_dim, tuple(model.patch_embed.grid_size),
        create_transform(**data, is_training=False), lambda output: output,
    )  # fmt: skip


def load_transformers(cfg: Mapping[str, Any], pretrained: bool = True, config: Any = None) -> Backbone:
    """A transformers vision encoder (CLIP, SigLIP, DINOv2, MAE with masking off, ViT …).

    ``cfg.published`` names ``model``, ``image_size`` and ``layer``. With ``config`` the model is built
    from it with random weights.
    """
    import transformers

    wanted = cfg["published"]
    try:
        if config is None:
            config = transformers.AutoConfig.from_pretrained(wanted["model"])
        config = getattr(config, "vision_config", None) or config
        if hasattr(config, "mask_ratio"):
            config.mask_ratio = 0.0
        build: Any = {
            "clip_vision_model": transformers.CLIPVisionModel,
            "siglip_vision_model": transformers.SiglipVisionModel,
            "siglip2_vision_model": getattr(transformers, "Siglip2VisionModel", None),
        }.get(config.model_type, transformers.AutoModel)
        if pretrained:
            model = build.from_pretrained(wanted["model"], config=config)
            processor = transformers.AutoImageProcessor.from_pretrained(wanted["model"])
            mean, std = tuple(processor.image_mean), tuple(processor.image_std)
        else:
            model = build.from_config(config) if build is transformers.AutoModel else build(config)
            mean = std = (0.5, 0.5, 0.5)
    except Exception as error:
        raise BackboneError(NO_WEIGHTS.format(model=wanted["model"], error=error)) from error
    size, patch = wanted["image_size"], config.patch_size
    grid = (size // patch, size // patch)
    transform = create_transform((3, size, size), mean=mean, std=std, crop_pct=1.0, interpolation="bicubic")
    blocks = _block_path(model, config.num_hidden_layers)
    plain = _Plain(model.eval())
    with torch.no_grad():
        tokens = plain(torch.zeros(1, 3, size, size)).last_hidden_state.shape[1]
    return _backbone(cfg, plain, f"model.{blocks}", tokens - grid[0] * grid[1], config.hidden_size, grid,
                     transform, _pooled)  # fmt: skip


class _Plain(nn.Module):
    """Takes images as its first argument; an MAE keeps its tokens in order."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        if self.model.config.model_type == "vit_mae":
            patches = (images.shape[-2] // self.model.config.patch_size) * (
                images.shape[-1] // self.model.config.patch_size
            )
            order = torch.arange(patches, device=images.device, dtype=torch.float32)
            return self.model(images, noise=order.expand(len(images), -1))
        return self.model(images)


def _pooled(output: Any) -> Tensor:
    pooled = getattr(output, "pooler_output", None)
    return output.last_hidden_state[:, 0] if pooled is None else pooled


def _block_path(model: nn.Module, depth: int) -> str:
    """Path of the list of transformer blocks: the first ModuleList with one entry a hidden layer."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name
    raise BackboneError(f"{type(model).__name__} has no list of {depth} blocks to hook.")


def _backbone(
    cfg: Mapping[str, Any], model: nn.Module, blocks: str, prefix: int, width: int, grid: Any, transform: Any, pool: Any
) -> Backbone:
    wanted = cfg["published"]
    return Backbone(
        model,
        name=cfg["name"],
        title=f"{cfg['name']} ({wanted['title']})",
        blocks=blocks,
        prefix_tokens=prefix,
        layer=default_layer(cfg, "published"),
        d_in=width,
        grid=grid,
        image_size=wanted["image_size"],
        transform=transform,
        pool=pool,
    )
