"""Configs of vision-language models for the tests, as ``vlm=<name>`` composes them, and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

CONF = Path(__file__).resolve().parents[2] / "conf" / "vlm"


def vlm(name: str, **changes: Any) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), changes), resolve=True)


def noise(count: int, seed: int = 0, height: int = 40, width: int = 56) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(count)]
