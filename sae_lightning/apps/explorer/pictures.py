"""Pictures as the page shows them: squares as WebP, plain or with a latent's patches lit."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from sae_lightning.report.strips import overlay

SMALL, LARGE = 96, 288  # pixels at most: in lists, and alone
SIZES = (SMALL, LARGE)


def square(picture: Image.Image, largest: int) -> Image.Image:
    """The centred square of an RGB picture, at most ``largest`` pixels wide; small ones keep their pixels."""
    side = min(picture.size)
    left, upper = (picture.width - side) // 2, (picture.height - side) // 2
    cut = picture.crop((left, upper, left + side, upper + side))
    return cut if side <= largest else cut.resize((largest, largest), Image.Resampling.LANCZOS)


def webp(picture: Image.Image) -> bytes:
    """The picture as WebP."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=88, method=4)
    return buffer.getvalue()


def lit(picture: Image.Image, activation: np.ndarray, peak: float) -> Image.Image:
    """A square ``picture`` with the patches lit on which ``activation`` [rows, columns] is positive, up to ``peak``."""
    return overlay(picture, activation, peak)
