"""Scikit-learn's 1,797 handwritten digits as pictures: another domain that comes without a download."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from PIL import Image

from sae_lightning.data.images import ImageData
from sae_lightning.data.splits import SPLITS, cut

SIDE = 32  # pixels of a picture's edge: what the tiny backbones take
INK = 16  # the largest grey value of the data set


def load_digits(cfg: dict[str, Any], split: str) -> ImageData:
    """``split`` of the digits: ``shares`` of each class, drawn by ``seed``; white ink on black, 32 × 32, RGB.

    The classes are called "0" to "9". DataError for shares that leave a split nothing.
    """
    from sklearn import datasets

    found = datasets.load_digits()
    labels = found.target.astype(np.int64)
    digits = Digits(found.images.astype(np.uint8))
    images = ImageData(
        cfg["name"], split, [str(c) for c in range(10)], labels, [f"digit-{i:04d}" for i in range(len(labels))],
        digits.picture, digits.digest,
    )  # fmt: skip
    return images.take(cut(labels, {s: float(cfg["shares"][s]) for s in SPLITS[1:]}, split, cfg["seed"]))


class Digits:
    """Pictures of ``grey`` [n, 8, 8] uint8, each 0 (paper) to 16 (ink)."""

    def __init__(self, grey: np.ndarray) -> None:
        self.grey = grey

    def picture(self, row: int) -> Image.Image:
        """Digit ``row``, scaled up by bicubic interpolation."""
        small = np.rint(self.grey[row] * (255 / INK)).astype(np.uint8)
        return Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")

    def digest(self, row: int) -> bytes:
        """What changes when the digit does, or the way it is drawn."""
        return hashlib.sha256(f"bicubic {SIDE}".encode() + self.grey[row].tobytes()).digest()
