"""The one interface of every vision encoder: images in, patch tokens of a named block and pooled features out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn


class BackboneError(ValueError):
    """A backbone that cannot be had, or a layer or image that does not fit it."""


def default_layer(cfg: Mapping[str, Any], size: str | None = None) -> int:
    """``cfg.layer``, or the default layer of ``size`` (by default the config's own)."""
    return cfg[size or cfg["size"]]["layer"] if cfg.get("layer") is None else cfg["layer"]


class Backbone(nn.Module):
    """A frozen encoder with a hook on one transformer block.

    ``name`` is what configs call it, ``title`` what tables show; ``layer`` the default block (from 0);
    ``d_in`` the width, ``grid`` the patch grid (rows, columns) with ``n_patches`` cells. ``transform``
    turns a PIL image into the model's input [3, H, W].

    ``blocks`` is the path of the block list inside ``model``; ``prefix_tokens`` the class and register
    tokens before the patches; ``pool`` turns the model's output into [B, d_pooled].
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        title: str,
        blocks: str,
        prefix_tokens: int,
        layer: int,
        d_in: int,
        grid: tuple[int, int],
        image_size: int,
        transform: Callable[[Image.Image], Tensor],
        pool: Callable[[Any], Tensor],
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.name, self.title, self.d_in, self.grid, self.image_size = name, title, d_in, grid, image_size
        self.prefix_tokens = prefix_tokens
        self.transform = transform
        self._pool = pool
        self._blocks: nn.ModuleList = model.get_submodule(blocks)  # type: ignore[assignment]
        self.depth = len(self._blocks)
        self.layer = self.check_layer(layer)

    @property
    def n_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def check_layer(self, layer: int) -> int:
        """``layer`` itself; BackboneError unless it is one of the blocks."""
        if not 0 <= layer < self.depth:
            raise BackboneError(
                f"Layer {layer} does not exist in {self.title}: its blocks are 0 to {self.depth - 1}. "
                "Set backbone.layer."
            )
        return layer

    @torch.no_grad()
    def forward_features(self, images: Tensor, layer: int | None = None) -> dict[str, Tensor]:
        """Patch tokens of block ``layer`` [B, P, d_in] and the model's pooled output [B, d_pooled].

        ``images`` [B, 3, H, W] as ``transform`` makes them. Class and register tokens are dropped.
        BackboneError for a layer out of range or another image size.
        """
        block = self._blocks[self.check_layer(self.layer if layer is None else layer)]
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise BackboneError(
                f"{self.title} takes images of {self.image_size} x {self.image_size} pixels; "
                f"it got {images.shape[-2]} x {images.shape[-1]}. Use its transform."
            )
        seen: list[Tensor] = []

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        handle = block.register_forward_hook(hook)
        try:
            pooled = self._pool(self.model(images))
        finally:
            handle.remove()
        patch = seen[0][:, self.prefix_tokens :]
        if patch.shape[1] != self.n_patches:
            raise BackboneError(f"{self.title} gave {patch.shape[1]} patch tokens; expected {self.n_patches}.")
        return {"patch": patch, "pooled": pooled}

    def describe(self) -> str:
        """What, beside the weights, changes the features: for the fingerprint."""
        return f"{self.title}|{self.image_size}|{self.prefix_tokens}|{self.transform}"

    def fingerprint(self) -> str:
        """Hex digest of weights, architecture and transform."""
        digest = hashlib.sha256(self.describe().encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
