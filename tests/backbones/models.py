"""Configs of backbones for the tests: the bundled ones, and small random ones of timm and transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from tests.configs import CONF, composed

WITHOUT_MODEL = ("timm", "transformers", "features")  # what names none
PRESETS = sorted(path.stem for path in (CONF / "backbone").glob("*.yaml") if path.stem not in WITHOUT_MODEL)

COMMON = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
VISION = COMMON | {"image_size": 32, "patch_size": 8}
TEXT = COMMON | {"hidden_size": 24, "vocab_size": 40, "max_position_embeddings": 12}
CLIP = {
    "model_type": "clip",
    "projection_dim": 20,
    "vision_config": VISION,
    "text_config": TEXT | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
SIGLIP = {
    "model_type": "siglip",
    "vision_config": VISION,
    "text_config": TEXT | {"projection_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}


def backbone(name: str, /, size: str = "tiny", **changes: Any) -> dict[str, Any]:
    """The config node that ``backbone=<name>`` composes to, with ``changes``."""
    node = composed("extract", f"backbone={name}", f"data.backbones={size}").backbone
    OmegaConf.set_struct(node, False)
    return OmegaConf.to_container(OmegaConf.merge(node, changes), resolve=True)


def timm(model: str, layer: int | None = None, **section: Any) -> dict[str, Any]:
    """``backbone=timm`` with random weights; ``section`` changes ``published``."""
    return backbone("timm", layer=layer, published={"model": model, "pretrained": False} | section)


def transformers(architecture: dict[str, Any], layer: int | None = None, **section: Any) -> dict[str, Any]:
    """``backbone=transformers`` with random weights in ``architecture``; ``section`` changes ``published``."""
    about = {"model": "org/small", "pretrained": False, "architecture": architecture}
    return backbone("transformers", layer=layer, published=about | section)


def picture(height: int = 40, width: int = 56) -> Image.Image:
    """Smooth colours, the same each time."""
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / (3 + c)) + np.cos(columns / (4 + c)) for c in range(3)]
    return Image.fromarray((127 + 60 * np.stack(waves, -1)).astype(np.uint8))
