"""What an encoder sees of a picture, so that patches are drawn where they lie."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

from PIL import Image

from sae_lightning.backbones.registry import load_backbone
from sae_lightning.data.errors import DataError
from sae_lightning.data.geometry import seen, steps_of


def seen_by(backbone: Mapping[str, Any]) -> Callable[[Image.Image], Image.Image]:
    """What gives the part of a picture that the encoder of the config section ``backbone`` sees.

    The whole picture where the encoder cannot be loaded here, or prepares pictures in ways that are not known.
    """
    return _seen_by(json.dumps(dict(backbone), sort_keys=True))


@lru_cache(16)
def _seen_by(section: str) -> Callable[[Image.Image], Image.Image]:
    try:
        return seen_through(load_backbone(json.loads(section)).transform)
    except (ValueError, OSError, ImportError, KeyError, TypeError):
        return lambda image: image


def seen_through(transform: Any) -> Callable[[Image.Image], Image.Image]:
    """The same of an encoder's ``transform``."""
    try:
        steps_of(transform)
    except DataError:
        return lambda image: image
    return partial(seen, transform=transform)
