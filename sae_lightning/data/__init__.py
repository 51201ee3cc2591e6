"""Image data sets behind one interface: ``load_images(cfg.data, split)``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sae_lightning.data.decode import Item, decode
from sae_lightning.data.errors import DataError, NotGivenError
from sae_lightning.data.images import ImageData, data_source
from sae_lightning.data.levels import Reading
from sae_lightning.data.masks import Masks, load_masks
from sae_lightning.data.siblings import sibling_groups
from sae_lightning.data.splits import SPLITS, arrange, check_split
from sae_lightning.data.stream import ImageStream
from sae_lightning.registry import discover


def load_images(data: Mapping[str, Any], split: str) -> ImageData | ImageStream:
    """The ``split`` (train, val or test) of the data set that the config node ``data`` describes.

    An ImageStream for ``data=hf data.streaming=true``, else ImageData, with as many images as ``data.limit``
    says, in the order that ``data.shuffle`` says, and with the sibling groups of the file ``data.siblings``, else the
    data set's own, else those of ImageNet's classes. Raises DataError for an unknown source or split, and for whatever
    is missing or broken in it.
    """
    check_split(split)
    reading = Reading.of(data)
    images = data_source[data["source"]](dict(data), split)
    if isinstance(images, ImageStream):
        return images.read_as(reading)
    images.reading = reading
    own = data.get("siblings")
    if own is not None or not images.sibling_groups:
        images.sibling_groups = sibling_groups(images.class_names, own)
    return arrange(images, data)


discover(__name__)

__all__ = [
    "SPLITS",
    "DataError",
    "ImageData",
    "ImageStream",
    "Item",
    "Masks",
    "NotGivenError",
    "data_source",
    "decode",
    "load_images",
    "load_masks",
    "sibling_groups",
]
