"""Pictures that a program holds or names one by one, as a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sae_lightning.data.decode import Source
from sae_lightning.data.errors import DataError
from sae_lightning.data.images import ImageData
from sae_lightning.data.splits import UNLABELLED, class_name, sorted_names


def given_images(
    pictures: Sequence[Any], labels: Sequence[Any] | None = None, name: str = "given", split: str = "train"
) -> ImageData:
    """``pictures`` as a data set: PIL images, paths, encoded bytes, or arrays and tensors [H, W, 3] or [3, H, W].

    Arrays are uint8, or floats between 0 and 1. Pairs (picture, label), as torchvision's data sets give them, bring
    their ``labels``; numbers and names become class names. DataError names the picture that is none of these.
    """
    if not len(pictures):
        raise DataError("There are no pictures in the list.")
    items = [pictures[i] for i in range(len(pictures))]
    if labels is None and all(isinstance(item, tuple | list) and len(item) == 2 for item in items):
        items, labels = [item[0] for item in items], [item[1] for item in items]
    if labels is not None and len(labels) != len(items):
        raise DataError(f"There are {len(labels)} labels for {len(items)} pictures; give one for each.")
    found = [as_source(item, i) for i, item in enumerate(items)]
    classes = [UNLABELLED] * len(found) if labels is None else [class_name(_number(label)) for label in labels]
    names = sorted_names(classes)
    place = {each: i for i, each in enumerate(names)}
    ids = [f"{i}-{source.name}" if isinstance(source, Path) else str(i) for i, source in enumerate(found)]
    return ImageData(
        name, split, names, [place[each] for each in classes], ids, partial(_at, found), partial(_content, found)
    )


def as_source(picture: Any, number: int = 0) -> Source:
    """What ``data/decode.py`` reads of a picture of any kind; DataError with its ``number`` for what is none."""
    if isinstance(picture, str):
        return Path(picture)
    if isinstance(picture, bytes | Path | Image.Image):
        return picture
    if hasattr(picture, "detach"):
        picture = picture.detach().cpu().numpy()
    x = np.asarray(picture)
    if x.ndim == 3 and x.shape[0] in (1, 3) and x.shape[2] not in (1, 3):
        x = x.transpose(1, 2, 0)
    if x.ndim == 3 and x.shape[2] == 1:
        x = x[..., 0]
    if x.ndim not in (2, 3) or (x.ndim == 3 and x.shape[2] != 3) or x.dtype.kind not in "uf":
        raise DataError(
            f"Picture {number} is {type(picture).__name__} of shape {list(x.shape)} and type {x.dtype}; give a PIL "
            "image, a path, or an array [H, W, 3] or [3, H, W] of uint8 or of floats from 0 to 1."
        )
    if x.dtype.kind == "f":
        if not (x.min() >= 0 and x.max() <= 1):
            raise DataError(
                f"Picture {number} has values from {x.min():.3g} to {x.max():.3g}; floats are to be from 0 to 1, "
                "before any normalisation, which is the encoder's."
            )
        x = np.round(x * 255)
    return Image.fromarray(np.ascontiguousarray(x.astype(np.uint8)))


def _number(label: Any) -> Any:
    return label.item() if hasattr(label, "item") else label


def _at(found: Sequence[Source], i: int) -> Source:
    return found[i]


def _content(found: Sequence[Source], i: int) -> bytes:
    source = found[i]
    if isinstance(source, Image.Image):
        data = f"{source.mode}{source.size}".encode() + source.tobytes()
    else:
        data = source.read_bytes() if isinstance(source, Path) else bytes(source)  # type: ignore[arg-type]
    return hashlib.sha256(data).digest()
