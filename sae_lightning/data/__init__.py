"""Image data sets behind one interface: ``load_images(cfg.data, split)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sae_lightning.data.folder import load_folder, load_imagenet
from sae_lightning.data.hub import load_hub
from sae_lightning.data.images import SPLITS, DataError, ImageData, check_split
from sae_lightning.data.parquet import load_cifar10, load_demo

SOURCES: dict[str, Callable[[dict[str, Any], str], ImageData]] = {
    "demo": load_demo,
    "cifar10": load_cifar10,
    "folder": load_folder,
    "imagenet": load_imagenet,
    "hub": load_hub,
}


def load_images(data: Mapping[str, Any], split: str) -> ImageData:
    """The ``split`` (train, val or test) of the data set that the config node ``data`` describes.

    Raises DataError for an unknown source or split, and for whatever is missing or broken in it.
    """
    check_split(split)
    source = data["source"]
    if source not in SOURCES:
        raise DataError(f"Unknown data.source={source}; choose one of {', '.join(SOURCES)}.")
    return SOURCES[source](dict(data), split)


__all__ = ["SPLITS", "DataError", "ImageData", "load_images"]
