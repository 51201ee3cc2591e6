"""One forward pass of a plain vision transformer of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sae_lightning.backbones.base import LayerTokens, Reading
from sae_lightning.backbones.errors import BackboneError
from sae_lightning.backbones.hooks import block_outputs


def read_transformers(
    model: Any,
    blocks: Sequence[nn.Module],
    grid: tuple[int, int],
    images: Tensor,
    layers: Collection[int],
    pooled: bool,
) -> Reading:
    """One forward pass of a transformers model with hooks on the wanted ``blocks``.

    Tokens are as the blocks give them, [B, n + rows · columns, d]; the first of n > 0 in front of the patches
    is the class token. It also stands in, after the final norm, for the pooled output of models without a
    pooler. BackboneError if the blocks do not give one token a patch of every image.
    """
    outputs, result = block_outputs(lambda: model(**model_inputs(model, images)), blocks, layers, finish=pooled)
    patches = grid[0] * grid[1]
    for layer in layers:
        shape = tuple(outputs[layer].shape) if layer in outputs else ()
        if len(shape) != 3 or shape[0] != len(images) or shape[1] < patches:
            count = f"{len(images)} images" if len(images) > 1 else "an image"
            raise BackboneError(
                f"{type(model).__name__} gives {shape or 'nothing'} for {count} after layer {layer}, not one token for "
                f"each of {patches} patches; it is no plain vision transformer and not supported. timm may have it: "
                "try backbone=timm."
            )
    tokens_of = {
        layer: LayerTokens(out[:, -patches:], out[:, 0] if out.shape[1] > patches else None, grid)
        for layer, out in outputs.items()
    }
    if result is None:
        return Reading(tokens_of, None)
    last = getattr(result, "last_hidden_state", None)
    if last is None:
        raise BackboneError(
            f"{type(model).__name__} gives no last_hidden_state; it is no plain vision transformer and not supported. "
            "timm may have it: try backbone=timm."
        )
    class_token = last[:, 0] if last.shape[1] > patches else None
    own = getattr(result, "pooler_output", None)
    return Reading(tokens_of, class_token if own is None else own)


def model_inputs(model: Any, images: Tensor) -> dict[str, Tensor | bool]:
    """The arguments with which ``model`` encodes ``images`` [B, 3, H, W] completely and in order."""
    config, (count, _, height, width) = model.config, images.shape
    rows, columns = height // config.patch_size, width // config.patch_size
    if config.model_type == "siglip2_vision_model":  # takes patches [B, P, patch_size² · 3]
        cut = images[:, :, : rows * config.patch_size, : columns * config.patch_size]
        cut = cut.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))
        return {
            "pixel_values": cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2),
            "pixel_attention_mask": images.new_ones(count, rows * columns, dtype=torch.long),
            "spatial_shapes": torch.tensor([[rows, columns]] * count, device=images.device),
        }
    inputs: dict[str, Tensor | bool] = {"pixel_values": images}
    if config.model_type == "vit_mae":  # shuffles patches by this noise
        inputs["noise"] = torch.arange(rows * columns, device=images.device, dtype=torch.float32).expand(count, -1)
    if height != config.image_size and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        inputs["interpolate_pos_encoding"] = True
    return inputs
