"""TIFF pictures of the depths and channels that Pillow does not read, or not as they are meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from sae_lightning.data.levels import Samples

HEADS = (b"MM\x00\x2a", b"II\x2a\x00", b"MM\x00\x2b", b"II\x2b\x00")  # the last two of BigTIFF
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, MASK, CMYK = range(6)
COLOURS = {WHITE_IS_ZERO: None, BLACK_IS_ZERO: None, RGB: 3, PALETTE: 3, MASK: None, CMYK: None}
INTEGERS, SIGNED, FLOATS, UNKNOWN = 1, 2, 3, 4  # sample formats
BITS, CHANNELS, FORMAT = 258, 277, 339  # tags
ALPHA = (1, 2)  # kinds of extra samples


def is_tiff(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a TIFF."""
    return head.startswith(HEADS)


def pillow_knows(picture: Image.Image) -> bool:
    """Whether Pillow reads this TIFF as it is meant: up to 8 bits, unsigned, and all of its channels."""
    tags = picture.tag_v2  # type: ignore[attr-defined]
    plain = all(kind in (INTEGERS, UNKNOWN) for kind in tags.get(FORMAT, (INTEGERS,)))
    return plain and max(tags.get(BITS, (1,))) <= 8 and tags.get(CHANNELS, 1) == len(picture.getbands())


def tiff_samples(file: BinaryIO | Path, picture: Image.Image | None) -> Samples | Image.Image:
    """The samples of the first page, or a picture where they are CMYK.

    ``picture`` is Pillow's, if it opened the file, for compressions that tifffile leaves to another package.
    ValueError for what neither reads, and for a page that is cut off.
    """
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages.first
        size = tiff.filehandle.size
        if any(at + count > size for at, count in zip(page.dataoffsets, page.databytecounts, strict=True)):
            raise ValueError("the file is truncated")
        if page.imagewidth * page.imagelength > 2 * (Image.MAX_IMAGE_PIXELS or 1 << 62):
            raise ValueError(f"{page.imagewidth} x {page.imagelength} pixels are too many")
        if page.imagedepth != 1:
            raise ValueError("it is a volume, not a picture")
        if page.photometric not in COLOURS:
            raise ValueError(f"{getattr(page.photometric, 'name', page.photometric)} of {page.bitspersample} bits")
        bits, inverted = page.bitspersample, page.photometric == WHITE_IS_ZERO
        try:
            values = page.asarray()
        except (ValueError, NotImplementedError) as error:  # what tifffile needs another package for
            planes = page.planarconfig != 1 and page.samplesperpixel > 1
            if page.compression == 1 and not page.is_tiled and not planes and page.sampleformat == INTEGERS:
                values = _unpacked(page, tiff.filehandle)
            elif picture is not None and not planes:
                values = _from_pillow(picture)
                if values.dtype == np.uint8:  # all done
                    return Samples(values.reshape(*values.shape[:2], -1), 8, COLOURS[page.photometric])
            else:
                raise ValueError(f"{error}; install it, or save the picture without compression") from error
        else:
            values = np.moveaxis(values, 0, -1) if page.axes.startswith("S") else values
        if page.photometric == PALETTE and page.colormap is not None:
            places = values[..., 0] if values.ndim == 3 else values
            return Samples(np.moveaxis(page.colormap[:, places], 0, -1), 16, 3)
        values = values.reshape(*values.shape[:2], -1)
        values = values.astype(np.uint8) if values.dtype == bool else values
        if page.photometric == CMYK:
            return _of_inks(values, bits)
        colours = COLOURS[page.photometric]
        if colours is None and values.shape[2] - len(page.extrasamples) == 1 and set(page.extrasamples) & {*ALPHA}:
            colours = 1
        return Samples(values, bits, colours, inverted)


def _unpacked(page: Any, file: Any) -> np.ndarray:
    """Samples of any number of bits, such as 12, that are packed side by side, [H, W · C] uint16."""
    width, bits = page.imagewidth * page.samplesperpixel, page.bitspersample
    row = -(-width * bits // 8)
    strips = file.read_segments(page.dataoffsets, page.databytecounts, sort=False)
    data = b"".join(strip or b"" for strip, _ in strips)
    packed = np.frombuffer(data, np.uint8, row * page.imagelength).reshape(-1, row)
    unpacked = np.unpackbits(packed, axis=1)[:, : width * bits].reshape(len(packed), width, bits)
    values = unpacked @ (1 << np.arange(bits, dtype=np.uint16)[::-1])
    return values.reshape(len(packed), page.imagewidth, page.samplesperpixel)


def _from_pillow(picture: Image.Image) -> np.ndarray:
    """Pillow's array, with the type that the file gives its samples."""
    values = np.asarray(picture)
    bits, kind = picture.tag_v2.get(BITS, (1,))[0], picture.tag_v2.get(FORMAT, (INTEGERS,))[0]  # type: ignore[attr-defined]
    if values.dtype == np.int32:
        return values.view(np.uint32) if (bits, kind) == (32, INTEGERS) else values.astype(f"int{bits}")
    return values.view(np.int8) if (values.dtype, kind) == (np.uint8, SIGNED) else values


def _of_inks(values: np.ndarray, bits: int) -> Image.Image:
    """Four inks of 8 or 16 bits as Pillow mixes them."""
    if values.dtype.kind != "u" or bits not in (8, 16):
        raise ValueError(f"CMYK of {bits} bits")
    inks = np.ascontiguousarray((values[..., :4] >> (bits - 8)).astype(np.uint8))
    return Image.frombytes("CMYK", (inks.shape[1], inks.shape[0]), inks.tobytes())
