"""One picture that has not been decoded yet, and its decoding to RGB."""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from sae_lightning.data.errors import DataError, brief

Source = bytes | str | Path | Image.Image  # encoded bytes, a path, an address that fsspec opens, or a picture
ADDRESS = re.compile(r"^[a-z0-9+]+://")
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a data set. ``label`` indexes the class names, or is the name itself while they are not known."""

    image: Source
    image_id: str
    label: int | str
    caption: str | None = None


def decode(item: Item) -> Image.Image:
    """The item's picture in RGB (see ``to_rgb``); safe to call from many threads."""
    return to_rgb(item.image, item.image_id)


def to_rgb(source: Source, image_id: str) -> Image.Image:
    """``source`` as an RGB picture; DataError naming ``image_id`` when it is empty, truncated or no picture.

    Grey, palette and CMYK pictures are converted, 16-bit grey ones scaled to 8 bits, and transparency is
    dropped. EXIF orientation is ignored. Both follow torchvision's readers, with which published backbones
    were trained and scored on ImageNet.
    """
    if isinstance(source, bytes) and not source:
        raise DataError(f"Image '{image_id}' is empty; remove it or replace it by a whole copy.")
    try:
        if isinstance(source, Image.Image):
            return _rgb(source)
        with Image.open(_file(source)) as picture:
            return _rgb(picture)
    except BROKEN as error:
        raise DataError(
            f"Image '{image_id}' cannot be read ({brief(error)}); remove it or replace it by a whole copy."
        ) from error


def _file(source: bytes | str | Path) -> BinaryIO | str | Path:
    if isinstance(source, bytes | bytearray):
        return io.BytesIO(source)
    if isinstance(source, str) and ADDRESS.match(source):
        import fsspec

        with fsspec.open(source, "rb") as file:
            return io.BytesIO(file.read())
    return source


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # Pillow would clip 16 bits at 255
        eight = np.clip(np.asarray(picture, dtype=np.float32) / 257 + 0.5, 0, 255).astype(np.uint8)
        return Image.fromarray(eight).convert("RGB")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # without this Pillow warns
    return picture.convert("RGB")
