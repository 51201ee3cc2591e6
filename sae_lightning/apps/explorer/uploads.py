"""Pictures that the user gives the page: read from memory, checked before they are decoded, never written."""

from __future__ import annotations

import io
import warnings
from collections import OrderedDict
from itertools import count
from threading import Lock

from PIL import Image, ImageOps, UnidentifiedImageError

from sae_lightning.data.decode import to_rgb
from sae_lightning.data.errors import brief


class RefusedError(ValueError):
    """A request that cannot be answered: an HTTP ``status`` and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # decoders that uploads can reach

PIXELS = 40_000_000  # of a picture, before it is decoded

SIDE = 1024  # larger pictures are kept in this size

KEPT = 16  # pictures


def read_picture(data: bytes) -> Image.Image:
    """The picture in ``data`` in RGB, upright, at most 1,024 pixels wide and high.

    RefusedError with 415 for what is no whole picture of a known format, with 413 for more than 40 million pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures, which are refused below
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            if picture.width * picture.height > PIXELS:
                raise RefusedError(
                    413, f"The picture has {picture.width} × {picture.height} pixels; scale it down first."
                )
            picture.draft("RGB", (SIDE, SIDE))  # JPEG decodes straight to a smaller size
            whole = to_rgb(ImageOps.exif_transpose(picture), "upload")
    except RefusedError:
        raise
    except (Image.DecompressionBombError, MemoryError) as error:
        raise RefusedError(413, "The picture has too many pixels; scale it down first.") from error
    except Exception as error:  # decoders raise all kinds of things over broken files
        why = "" if isinstance(error, UnidentifiedImageError) else f" ({brief(error)})"
        raise RefusedError(
            415, f"This is no picture that can be read{why}; choose a whole PNG, JPEG, WebP, GIF or BMP file."
        ) from error
    whole.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return whole


class Uploads:
    """The last 16 pictures by number, from 0 on, in memory."""

    def __init__(self) -> None:
        self._pictures: OrderedDict[int, Image.Image] = OrderedDict()
        self._numbers, self._lock = count(), Lock()

    def add(self, picture: Image.Image) -> int:
        """Keep ``picture`` under the next number."""
        with self._lock:
            number = next(self._numbers)
            self._pictures[number] = picture
            while len(self._pictures) > KEPT:
                self._pictures.popitem(last=False)
        return number

    def __getitem__(self, number: int) -> Image.Image:
        with self._lock:
            if number not in self._pictures:
                raise RefusedError(404, f"Picture {number} is not held any more; upload it again.")
            return self._pictures[number]
