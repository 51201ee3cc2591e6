"""Loading the tiny backbones that ship with the package, and the text halves of two of them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from timm.data import create_transform
from torch import Tensor, nn

from sae_lightning.backbones.base import Backbone
from sae_lightning.backbones.errors import BackboneError
from sae_lightning.backbones.settings import asked_layer
from sae_lightning.backbones.timm_models import read_timm
from sae_lightning.backbones.tiny import DEPTH, IMAGE_SIZE, PIXEL_MEAN, PIXEL_STD, WIDTH, TinyTextTower, tiny_vit
from sae_lightning.backbones.weights import fixed_seed

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


def tiny_identity(cfg: Mapping[str, Any]) -> str:
    """The name and the digest of the bundled weights, or ``random``."""
    name = cfg["name"]
    weights = hashlib.sha256(weights_file(name).read_bytes()).hexdigest() if _trained(cfg) else "random"
    return f"tiny:{name}:{weights}"


def load_tiny(cfg: Mapping[str, Any]) -> Backbone:
    """The tiny backbone ``cfg.name``; with ``cfg.tiny.pretrained=false`` the same architecture with random weights."""
    name, trained = cfg["name"], _trained(cfg)
    with fixed_seed():
        vit = tiny_vit(name)
        project = nn.Linear(WIDTH, WIDTH, bias=False) if name in IMAGE_TEXT else None
    if trained:
        vit.load_state_dict(_tensors(name, but=BESIDE))
        if project is not None:
            project.load_state_dict(_tensors(name, of="project."))
    return Backbone(
        vit,
        partial(read_timm, vit),
        name=name,
        title=f"{name} (tiny)" if trained else f"{name} (tiny, random weights)",
        depth=DEPTH,
        layer=asked_layer(cfg, "tiny"),
        image_size=IMAGE_SIZE,
        transform=create_transform(
            (3, IMAGE_SIZE, IMAGE_SIZE), mean=PIXEL_MEAN, std=PIXEL_STD, crop_pct=1.0, interpolation="bicubic"
        ),
        project=project,
        load_text=partial(_load_text, name, trained) if name in IMAGE_TEXT else None,
    )


def _load_text(name: str, trained: bool) -> TinyTextTower:
    with fixed_seed():
        tower = TinyTextTower((ASSETS / "vocabulary.txt").read_text(encoding="utf-8").split())
    if trained:
        tower.load_state_dict(_tensors(name, of="text."))
    return tower


def _tensors(name: str, of: str = "", but: Collection[str] = ()) -> dict[str, Tensor]:
    """The bundled tensors in float32 whose names start with ``of`` (taken off) and with none of ``but``."""
    return {
        key.removeprefix(of): tensor.float()
        for key, tensor in load_file(weights_file(name)).items()
        if key.startswith(of) and not key.startswith(tuple(but))
    }


def _trained(cfg: Mapping[str, Any]) -> bool:
    return cfg["tiny"].get("pretrained", True)
