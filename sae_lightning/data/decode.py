"""One picture that has not been decoded yet, and its decoding to RGB."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from sae_lightning.data.errors import DataError, brief, tell
from sae_lightning.data.levels import AS_FILED, Reading, Samples, picture_of, say_channels
from sae_lightning.data.tiff import is_tiff, pillow_knows, tiff_samples

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def without_metadata(data: bytes) -> bytes:
    """A PNG with nothing but its pixels: profiles, texts and whatever else need not be understood are left out."""
    kept = [SIGNATURE]
    at = len(SIGNATURE)
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if kind[:1].isupper() or kind == b"tRNS":
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def is_deep(picture: Image.Image) -> bool:
    """Whether this is a PNG of 16 bits in several channels, of which Pillow would keep the upper 8."""
    if picture.format != "PNG" or picture.mode == "I;16":
        return False
    return str(picture.tile[0][3]).endswith(";16B")  # type: ignore[attr-defined]


def png_samples(data: bytes) -> Samples:
    """All bits of all channels of a PNG; RuntimeError when it is damaged."""
    import torch
    from torchvision.io import ImageReadMode, decode_png

    values = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    channels = values.permute(1, 2, 0).numpy()
    return Samples(np.ascontiguousarray(channels), 16, 1 if channels.shape[2] < 3 else 3)


Source = bytes | str | Path | Image.Image  # encoded bytes, a path, an address that fsspec opens, or a picture

ADDRESS = re.compile(r"^[a-z0-9+]+://")

LONGEST = 1000  # times its shorter edge; beyond, a few bytes become gigabytes when the shorter one is scaled up

LAID_OUT = ("RGB", "RGBA", "RGBX", "L", "LA", "CMYK")  # modes whose channels are those of the file

WITH_ALPHA = {"RGBA": 3, "RGBa": 3, "RGBX": 3, "LA": 1, "La": 1}  # and how many channels are colours


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a data set. ``label`` indexes the class names, or is the name itself while they are not known."""

    image: Source
    image_id: str
    label: int | str
    caption: str | None = None
    reading: Reading = AS_FILED


def decode(item: Item) -> Image.Image:
    """The item's picture in RGB (see ``to_rgb``); safe to call from many threads."""
    return to_rgb(item.image, item.image_id, item.reading)


def to_rgb(source: Source, image_id: str, reading: Reading = AS_FILED) -> Image.Image:
    """``source`` as an RGB picture of 8 bits; DataError naming ``image_id`` when it cannot be made one.

    Grey, palette and CMYK pictures are converted, deeper ones scaled to 8 bits by what the file says of its samples or
    by the picture's range (see ``levels``), and transparency is dropped. EXIF orientation and metadata are ignored.
    Dropping and ignoring follow torchvision's readers, with which published backbones were trained and scored on
    ImageNet.
    """
    if isinstance(source, bytes) and not source:
        raise DataError(f"Image '{image_id}' is empty; remove it or replace it by a whole copy.")
    try:
        if isinstance(source, Image.Image):
            return _rgb(source, reading, image_id)
        source = _at_hand(source)
        try:
            return _opened(source, reading, image_id)
        except (ValueError, SyntaxError, OSError):
            data = _bytes(source)
            if not data.startswith(SIGNATURE):
                raise
            return _opened(without_metadata(data), reading, image_id)
    except DataError:
        raise
    except Exception as error:  # libraries raise all sorts for damaged files
        raise DataError(
            f"Image '{image_id}' cannot be read ({brief(error)}); remove it or replace it by a whole copy."
        ) from error


def _at_hand(source: bytes | str | Path) -> bytes | Path:
    if isinstance(source, str) and ADDRESS.match(source):
        import fsspec

        with fsspec.open(source, "rb") as file:
            return file.read()
    return Path(source) if isinstance(source, str) else bytes(source) if isinstance(source, bytearray) else source


def _bytes(source: bytes | Path) -> bytes:
    return source if isinstance(source, bytes) else source.read_bytes()


def _opened(source: bytes | Path, reading: Reading, image_id: str) -> Image.Image:
    """The picture in a file or its bytes."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(file) as picture:
            if picture.format != "JPEG" and getattr(picture, "is_animated", False):
                tell(f"Of pictures with several frames or pages (first: '{image_id}') the first is read.", "frames")
            if picture.format == "TIFF" and not (reading == AS_FILED and pillow_knows(picture)):
                return _made(tiff_samples(io.BytesIO(_bytes(source)), picture), reading, image_id)
            if is_deep(picture):
                return _made(png_samples(without_metadata(_bytes(source))), reading, image_id)
            return _rgb(picture, reading, image_id)
    except UnidentifiedImageError:
        data = _bytes(source)
        if not is_tiff(data[:4]):
            raise
        return _made(tiff_samples(io.BytesIO(data), None), reading, image_id)


def _made(samples: Samples | Image.Image, reading: Reading, image_id: str) -> Image.Image:
    if isinstance(samples, Image.Image):
        return _rgb(samples, reading, image_id)
    _check_shape(samples.values.shape[:2], image_id)
    return picture_of(samples, reading, image_id)


def _check_shape(size: tuple[int, ...], image_id: str) -> None:
    if max(size) > LONGEST * min(size):
        raise DataError(
            f"Image '{image_id}' has {size[0]} x {size[1]} pixels; one edge is more than {LONGEST} times "
            "the other, which no encoder can look at. Remove it or cut it up."
        )


def _rgb(picture: Image.Image, reading: Reading, image_id: str) -> Image.Image:
    _check_shape(picture.size, image_id)
    mode = picture.mode
    if mode.startswith("I") or mode == "F":  # Pillow would clip at 255
        scaled = picture.format == "PPM" and picture.tile[0][0] == "ppm"  # type: ignore[attr-defined]  # to 16 bits
        values = np.asarray(picture)
        values = values.astype(np.uint16) if picture.format == "PPM" and mode != "F" else values
        samples = Samples(values[..., None], 8 * values.itemsize, exact=scaled)
        return picture_of(samples, reading, image_id)
    if mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # without this Pillow warns
    if reading.channels is not None:
        picture = picture if picture.mode in LAID_OUT else picture.convert("RGB")
        values = np.asarray(picture)
        return picture_of(Samples(values.reshape(*values.shape[:2], -1), 8), reading, image_id)
    if mode in WITH_ALPHA:
        say_channels(WITH_ALPHA[mode] + 1, WITH_ALPHA[mode], image_id)
    elif mode == "L":
        say_channels(1, 1, image_id)
    if mode in ("RGBa", "La"):
        picture = picture.convert(mode.upper())
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(picture, lab, srgb, outputMode="RGB") or picture
    return picture.convert("RGB")
