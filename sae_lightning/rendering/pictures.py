"""Sheets of top images, plain and with the patches marked on which a latent fires, as data URIs."""

from __future__ import annotations

import base64
import io

import numpy as np
from matplotlib import colormaps
from PIL import Image

GAP = 2  # transparent pixels between two images

LARGEST = 100  # thumbnails of larger images

SHOWN = 96  # pixels at least of what is shown, so that marks are thin

WARM, DARK = (255, 205, 64), (20, 20, 24)  # an outline within the patches, and around it

SILENT = 0.75  # of the light of patches on which a latent does not fire


def thumbnail(image: Image.Image, largest: int = LARGEST) -> Image.Image:
    """The centred square of an RGB image, at most ``largest`` pixels wide; small ones keep their pixels."""
    side = min(image.size)
    left, upper = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, upper, left + side, upper + side))
    return square if side <= largest else square.resize((largest, largest), Image.Resampling.LANCZOS)


def overlay(image: Image.Image, activation: np.ndarray) -> Image.Image:
    """The square ``image`` in its colours with the patches outlined on which ``activation`` [rows, columns] of the
    patch grid is positive; the others are a little darker. Small images are enlarged.
    """
    image = _enlarged(image)
    fires = _cells((activation > 0) * 255, image.width) > 0
    thick = max(1, round(image.width / 80))
    shown = np.asarray(image, dtype=np.float32) * np.where(fires, 1.0, SILENT)[..., None]
    shown[fires & ~_eroded(fires, thick)] = WARM
    shown[~fires & ~_eroded(~fires, 1, beyond=True)] = DARK
    return Image.fromarray(shown.astype(np.uint8))


def heat(image: Image.Image, activation: np.ndarray) -> Image.Image:
    """The square ``image``, patches where a latent fires tinted by ``activation`` [rows, columns], violet to yellow.

    The tint runs from the image's least to its largest activation, so that where the latent fires on every patch it
    still shows where it is strong, as Moran's I does; silent patches keep their colours and are a little darker.
    """
    image = _enlarged(image)
    span = activation.max() - activation.min()
    strength = (activation - activation.min()) / span if span > 0 else np.zeros_like(activation)
    tint = _cells(colormaps["inferno"](0.3 + 0.65 * strength)[..., :3] * 255, image.width).astype(np.float32)
    fires = _cells((activation > 0) * 255, image.width)[..., None] > 0
    pixels = np.asarray(image, dtype=np.float32)
    return Image.fromarray(np.where(fires, 0.4 * pixels + 0.6 * tint, SILENT * pixels).astype(np.uint8))


def _enlarged(image: Image.Image) -> Image.Image:
    """Twice, three times … as large where it is smaller than what is shown."""
    side = image.width * -(-SHOWN // image.width)
    return image if image.width >= SHOWN else image.resize((side, side), Image.Resampling.NEAREST)


def _cells(values: np.ndarray, side: int) -> np.ndarray:
    """Values of patches as those of ``side`` x ``side`` pixels."""
    return np.asarray(Image.fromarray(values.astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST))


def _eroded(mask: np.ndarray, by: int, beyond: bool = False) -> np.ndarray:
    """Pixels of ``mask`` whose neighbours at up to ``by`` pixels are in it too; those off the image are ``beyond``."""
    wide = np.pad(mask, by, constant_values=beyond)
    shifts = range(2 * by + 1)
    for axis, size in enumerate(mask.shape):
        wide = np.logical_and.reduce([wide.take(range(i, i + size), axis) for i in shifts])
    return wide


def strip(images: list[Image.Image], columns: int = 0) -> str:
    """Images of one size side by side, or ``columns`` a line, as a data URI; small ones are enlarged."""
    images = [_enlarged(image) for image in images]
    side, across = images[0].width, columns or len(images)
    lines, step = -(-len(images) // across), side + GAP
    sheet = Image.new("RGBA", (min(across, len(images)) * step - GAP, lines * step - GAP))
    for i, image in enumerate(images):
        sheet.paste(image.resize((side, side)), (i % across * step, i // across * step))
    return data_uri(sheet)


def data_uri(image: Image.Image) -> str:
    """A WebP as a data URI; method 6 takes twenty times as long as 4 for files of the same size."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=68, method=4, alpha_quality=100)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
