"""Pictures with a visible attribute put into some of them, in a known correlation with a class: a bias to be found."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from sae_lightning.data.errors import DataError
from sae_lightning.data.images import ImageData

VERSION = "planted 1"  # of how a mark is drawn, for the fingerprint
WARM, RED, YELLOW = (255, 120, 0), (255, 0, 0), (255, 255, 0)


def tint(pixels: np.ndarray, strength: float) -> np.ndarray:
    """A warm cast over the whole picture, ``strength`` of it."""
    return pixels + strength * (np.array(WARM, dtype=np.float64) - pixels)


def frame(pixels: np.ndarray, strength: float) -> np.ndarray:
    """A red frame, at strength 1 a tenth of the picture wide."""
    height, width = pixels.shape[:2]
    wide = max(1, round(0.1 * strength * min(height, width)))
    framed = np.empty_like(pixels)
    framed[:] = RED
    framed[wide : height - wide, wide : width - wide] = pixels[wide : height - wide, wide : width - wide]
    return framed


def corner(pixels: np.ndarray, strength: float) -> np.ndarray:
    """A yellow square in the upper left corner, at strength 1 a third of the picture's edges."""
    height, width = pixels.shape[:2]
    marked = pixels.copy()
    marked[: max(1, round(strength * height / 3)), : max(1, round(strength * width / 3))] = YELLOW
    return marked


def dark(pixels: np.ndarray, strength: float) -> np.ndarray:
    """Less light, by the share ``strength``."""
    return pixels * (1 - strength)


ATTRIBUTES: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "tint": tint, "frame": frame, "corner": corner, "dark": dark
}  # fmt: skip


def mark(image: Image.Image, attribute: str, strength: float) -> Image.Image:
    """``image`` (RGB) with the ``attribute`` put in; DataError for an unknown one or a strength outside (0, 1]."""
    if attribute not in ATTRIBUTES:
        raise DataError(f"Unknown attribute '{attribute}' to plant; choose one of {', '.join(ATTRIBUTES)}.")
    if not 0 < strength <= 1:
        raise DataError(f"The strength of a planted attribute must be above 0 and at most 1; got {strength}.")
    changed = ATTRIBUTES[attribute](np.asarray(image, dtype=np.float64), strength)
    return Image.fromarray(np.clip(np.rint(changed), 0, 255).astype(np.uint8))


def assign(truth: np.ndarray, correlation: float, seed: int) -> np.ndarray:
    """Which of n images get the attribute, [n] bool, drawn by ``seed`` so that it correlates with ``truth`` [n] bool.

    Of the true images a share of (1 + correlation) / 2 has it, of the others (1 - correlation) / 2, up to rounding: in
    a balanced task this is the phi coefficient, and 0 makes it independent of the class. DataError outside [-1, 1].
    """
    if not -1 <= correlation <= 1:
        raise DataError(f"The correlation of a planted attribute must lie between -1 and 1; got {correlation}.")
    rng = np.random.default_rng(seed)
    has = np.zeros(len(truth), dtype=bool)
    for side, share in ((True, (1 + correlation) / 2), (False, (1 - correlation) / 2)):
        members = rng.permutation(np.flatnonzero(truth == side))
        has[members[: round(share * len(members))]] = True
    return has


class Marked:
    """Picture i of ``images`` with the attribute put in."""

    def __init__(self, images: ImageData, attribute: str, strength: float) -> None:
        self.images, self.attribute, self.strength = images, attribute, strength

    def __call__(self, row: int) -> Image.Image:
        return mark(self.images[row], self.attribute, self.strength)


def planted(images: ImageData, attribute: str, strength: float = 0.35) -> ImageData:
    """The same images, labels and ids, every picture with the ``attribute``; drawn when they are read."""
    content = hashlib.sha256(f"{VERSION} {attribute} {strength} {images.fingerprint}".encode()).digest()
    return ImageData(
        f"{images.name} with {attribute}", images.split, images.class_names, images.labels, images.image_ids,
        Marked(images, attribute, strength), content, images.captions, images.sibling_groups,
    )  # fmt: skip
