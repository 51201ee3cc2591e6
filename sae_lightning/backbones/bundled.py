"""Loading the tiny backbones that ship with the package, and their text towers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.data import create_transform
from torch import Tensor, nn

from sae_lightning.backbones.base import Backbone, BackboneError, default_layer
from sae_lightning.backbones.tiny import (
    IMAGE_SIZE,
    PATCH_SIZE,
    PIXEL_MEAN,
    PIXEL_STD,
    WIDTH,
    TinyTextTower,
    tiny_vit,
)

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "tiny"
IMAGE_TEXT = ("clip", "siglip")
BESIDE = ("text.", "project.", "logit_")  # what an image–text file holds beside its ViT


def weights_file(name: str) -> Path:
    """The bundled safetensors of the tiny backbone ``name``; BackboneError when it is not there."""
    path = ASSETS / f"{name}.safetensors"
    if not path.is_file():
        raise BackboneError(
            f"The weights of the tiny backbone '{name}' are missing ({path.name}); reinstall the package or train "
            "them with experiments/tiny_backbones."
        )
    return path


def file_digest(name: str) -> str:
    """SHA-256 of the bundled weights file."""
    return hashlib.sha256(weights_file(name).read_bytes()).hexdigest()


def load_tiny(cfg: Mapping[str, Any], pretrained: bool = True) -> Backbone:
    """The tiny backbone ``cfg.name``; with ``pretrained=False`` the same architecture with random weights."""
    name = cfg["name"]
    vit = tiny_vit(name)
    if pretrained:
        tensors = load_file(weights_file(name))
        vit.load_state_dict({k: v.float() for k, v in tensors.items() if not k.startswith(BESIDE)})
    side = IMAGE_SIZE // PATCH_SIZE
    transform = create_transform(
        (3, IMAGE_SIZE, IMAGE_SIZE), mean=PIXEL_MEAN, std=PIXEL_STD, crop_pct=1.0, interpolation="bicubic"
    )
    return Backbone(
        vit,
        name=name,
        title=f"{name} (tiny)",
        blocks="blocks",
        prefix_tokens=vit.num_prefix_tokens,
        layer=default_layer(cfg, "tiny"),
        d_in=WIDTH,
        grid=(side, side),
        image_size=IMAGE_SIZE,
        transform=transform,
        pool=lambda output: output,
    )


class TextTower(nn.Module):
    """The text half of the tiny ``clip`` or ``siglip``, with the projection of its images."""

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in IMAGE_TEXT:
            raise BackboneError(f"The tiny backbone '{name}' has no text tower; {' and '.join(IMAGE_TEXT)} have one.")
        tensors = {k: v.float() for k, v in load_file(weights_file(name)).items()}
        words = (ASSETS / "vocabulary.txt").read_text().split()
        self.text = TinyTextTower(words)
        self.text.load_state_dict({k.removeprefix("text."): v for k, v in tensors.items() if k.startswith("text.")})
        self.project = nn.Linear(WIDTH, WIDTH, bias=False)
        self.project.load_state_dict({"weight": tensors["project.weight"]})
        self.register_buffer("logit_scale", tensors["logit_scale"])
        self.register_buffer("logit_bias", tensors["logit_bias"])
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Tensor:
        """Unit-norm embeddings [B, 128] of captions."""
        return F.normalize(self.text(captions), dim=-1)

    @torch.no_grad()
    def encode_images(self, pooled: Tensor) -> Tensor:
        """Unit-norm embeddings [B, 128] of the backbone's pooled features [B, 128], comparable to the captions'."""
        return F.normalize(self.project(pooled.float()), dim=-1)


__all__ = ["TextTower", "file_digest", "load_tiny", "weights_file"]
