"""Pictures with an exact mask out of the demo's: two images of different classes, joined along a straight line."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sae_lightning.data.decode import Source, to_rgb
from sae_lightning.data.errors import DataError
from sae_lightning.data.images import ImageData
from sae_lightning.data.parquet import load_demo
from sae_lightning.data.splits import SPLITS

SMALLER = 30  # per cent of the picture that the smaller part has at least
VERSION = b"mosaic 1"  # of how a plan becomes a picture, for the fingerprint


class Plan(NamedTuple):
    """Of each of n pictures: which images it joins, where the line's normal points, and the first one's share.

    All [n] int64: positions of the images, degrees, per cent.
    """

    first: np.ndarray
    second: np.ndarray
    degrees: np.ndarray
    percent: np.ndarray


def load_mosaic(cfg: dict[str, Any], split: str) -> ImageData:
    """``sizes[split]`` pictures from the images of the demo's ``split``, drawn by ``seed``; made when they are read.

    A picture's label is the class of its larger part. Raises DataError for a size below 1.
    """
    mosaic, labels = _mosaic(cfg, split)
    return _images(cfg, split, mosaic, labels, mosaic.picture)


def load_mosaic_masks(cfg: dict[str, Any], split: str) -> ImageData:
    """The same, but what is read are the masks: the class of each pixel, [32, 32] in mode L."""
    mosaic, labels = _mosaic(cfg, split)
    return _images(cfg, split, mosaic, labels, mosaic.mask)


def draw(labels: np.ndarray, count: int, seed: int, split: str) -> Plan:
    """A plan of ``count`` pictures from images of ``labels`` [m]; DataError if these are all of one class."""
    if len(np.unique(labels)) < 2:
        raise DataError(f"The {split} split of the demo has images of one class only; a mosaic joins two.")
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    first, second = rng.integers(len(labels), size=(2, count))
    while (same := np.flatnonzero(labels[first] == labels[second])).size:
        second[same] = rng.integers(len(labels), size=same.size)
    return Plan(first, second, rng.integers(360, size=count), rng.integers(SMALLER, 101 - SMALLER, size=count))


def part_of_first(side: int, degrees: int, percent: int) -> np.ndarray:
    """[side, side] bool: the pixels on one side of a line whose normal has the angle ``degrees``.

    They are ``percent`` of the picture, up to pixels that are as far along the normal as the last one taken.
    """
    centre = (side - 1) / 2
    rows, columns = np.mgrid[:side, :side] - centre
    angle = np.deg2rad(degrees)
    along = np.round(columns * np.cos(angle) + rows * np.sin(angle), 6)
    return along <= np.sort(along, axis=None)[max(1, round(side * side * percent / 100)) - 1]


class Mosaic:
    """The pictures of a plan over ``images``."""

    def __init__(self, images: ImageData, plan: Plan) -> None:
        self.images, self.plan = images, plan
        self.side = images[0].width

    def part(self, row: int) -> np.ndarray:
        """Where picture ``row`` shows its first image, [side, side] bool."""
        return part_of_first(self.side, int(self.plan.degrees[row]), int(self.plan.percent[row]))

    def classes(self, row: int) -> tuple[int, int]:
        """The classes of its first and its second image."""
        return int(self.images.labels[self.plan.first[row]]), int(self.images.labels[self.plan.second[row]])

    def picture(self, row: int) -> Image.Image:
        """Picture ``row`` in RGB."""
        items = (self.images.item(int(which[row])) for which in (self.plan.first, self.plan.second))
        first, second = (np.asarray(to_rgb(item.image, item.image_id)) for item in items)
        return Image.fromarray(np.where(self.part(row)[..., None], first, second))

    def mask(self, row: int) -> Image.Image:
        """The class of each of its pixels, in mode L."""
        return Image.fromarray(np.where(self.part(row), *self.classes(row)).astype(np.uint8))

    def labels(self) -> np.ndarray:
        """The class of each picture's larger part, [n] int64."""
        first = [self.part(row).mean() >= 0.5 for row in range(len(self.plan.first))]
        return self.images.labels[np.where(first, self.plan.first, self.plan.second)]

    def content(self) -> bytes:
        """What changes when a picture does."""
        digest = hashlib.sha256(VERSION + self.images.fingerprint.encode())
        digest.update(np.stack(self.plan).astype("<i8").tobytes())
        return digest.digest()


def _mosaic(cfg: dict[str, Any], split: str) -> tuple[Mosaic, np.ndarray]:
    count = cfg["sizes"][split]
    if not isinstance(count, int) or count < 1:
        raise DataError(f"data.sizes.{split}={count} must be a whole number of at least 1.")
    images = load_demo({}, split)
    mosaic = Mosaic(images, draw(images.labels, count, cfg["seed"], split))
    return mosaic, mosaic.labels()


def _images(
    cfg: dict[str, Any], split: str, mosaic: Mosaic, labels: np.ndarray, read: Callable[[int], Source]
) -> ImageData:
    return ImageData(
        cfg["name"], split, mosaic.images.class_names, labels, [f"mosaic-{split}-{i:05d}" for i in range(len(labels))],
        read, mosaic.content(), sibling_groups=mosaic.images.sibling_groups,
    )  # fmt: skip
