"""What needs no download: the demo and CIFAR-10 in parquet files, scikit-learn's digits, and mosaics of the demo."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sae_lightning.data.decode import to_rgb
from sae_lightning.data.errors import DataError, brief
from sae_lightning.data.images import ImageData, data_source
from sae_lightning.data.splits import SPLITS, cut

DEMO = Path(__file__).resolve().parents[1] / "assets" / "demo"

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

CIFAR10_GROUPS = {
    "animals": ["bird", "cat", "deer", "dog", "frog", "horse"],
    "vehicles": ["airplane", "automobile", "ship", "truck"],
}


def read_table(path: Path, columns: list[str]) -> pa.Table:
    """The named columns of a parquet file; DataError when the file or a column is missing."""
    if not path.is_file():
        raise DataError(f"There is no file {path}; set data.path to the folder that holds {path.name}.")
    try:
        present = pq.read_schema(path).names
        missing = [c for c in columns if c not in present]
        if missing:
            raise DataError(f"{path} has no column {missing}; it has {present}.")
        return pq.read_table(path, columns=columns)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} cannot be read ({brief(error)}); it is truncated or not parquet.") from error


def _encoded(images: pa.Array, row: int) -> bytes:
    return images[row].as_py()


def _digest(images: pa.Array, row: int) -> bytes:
    return hashlib.sha256(_encoded(images, row)).digest()


def from_table(table: pa.Table, ids: list[str], **kwargs: Any) -> ImageData:
    """ImageData over the rows of ``table``, its images kept as encoded bytes."""
    images = table["image"].combine_chunks().field("bytes")
    read, content = partial(_encoded, images), partial(_digest, images)
    return ImageData(labels=table["label"].to_numpy(), image_ids=ids, read=read, content=content, **kwargs)


@data_source("demo")
def load_demo(cfg: dict[str, Any], split: str) -> ImageData:
    """The bundled part of CIFAR-10: ``experiments/demo_data`` made it, ``demo.json`` says from what."""
    about = json.loads((DEMO / "demo.json").read_text(encoding="utf-8"))
    table = read_table(DEMO / "demo.parquet", ["image", "label", "split", "image_id", "caption"])
    table = table.filter(pa.compute.equal(table["split"], split))
    return from_table(
        table,
        table["image_id"].to_pylist(),
        name="demo",
        split=split,
        class_names=about["class_names"],
        captions=table["caption"].to_pylist(),
        sibling_groups=about["sibling_groups"],
    )


@data_source("cifar10")
def load_cifar10(cfg: dict[str, Any], split: str) -> ImageData:
    """CIFAR-10 from ``train.parquet`` and ``test.parquet`` in ``path``; val is a stratified share of train."""
    file = "test" if split == "test" else "train"
    table = read_table(Path(cfg["path"]) / f"{file}.parquet", ["image", "label"])
    index = np.arange(len(table))
    if split != "test":
        index = cut(table["label"].to_numpy(), {"val": cfg["val_share"]}, split, cfg["seed"])
        table = table.take(index)
    return from_table(
        table,
        [f"{file}-{i:05d}" for i in index],
        name="cifar10",
        split=split,
        class_names=CIFAR10_CLASSES,
        sibling_groups=CIFAR10_GROUPS,
    )


SIDE = 32  # pixels of a picture's edge: what the tiny backbones take

INK = 16  # the largest grey value of the data set


@data_source("digits")
def load_digits(cfg: dict[str, Any], split: str) -> ImageData:
    """``split`` of the digits: ``shares`` of each class, drawn by ``seed``; white ink on black, 32 × 32, RGB.

    The classes are called "0" to "9". DataError for shares that leave a split nothing.
    """
    from sklearn import datasets

    found = datasets.load_digits()
    labels = found.target.astype(np.int64)
    digits = Digits(found.images.astype(np.uint8))
    images = ImageData(
        cfg["name"], split, [str(c) for c in range(10)], labels, [f"digit-{i:04d}" for i in range(len(labels))],
        digits.picture, digits.digest,
    )  # fmt: skip
    return images.take(cut(labels, {s: float(cfg["shares"][s]) for s in SPLITS[1:]}, split, cfg["seed"]))


class Digits:
    """Pictures of ``grey`` [n, 8, 8] uint8, each 0 (paper) to 16 (ink)."""

    def __init__(self, grey: np.ndarray) -> None:
        self.grey = grey

    def picture(self, row: int) -> Image.Image:
        """Digit ``row``, scaled up by bicubic interpolation."""
        small = np.rint(self.grey[row] * (255 / INK)).astype(np.uint8)
        return Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")

    def digest(self, row: int) -> bytes:
        """What changes when the digit does, or the way it is drawn."""
        return hashlib.sha256(f"bicubic {SIDE}".encode() + self.grey[row].tobytes()).digest()


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


@data_source("mosaic")
def load_mosaic(cfg: dict[str, Any], split: str, masks: bool = False) -> ImageData:
    """``sizes[split]`` pictures from the images of the demo's ``split``, drawn by ``seed``; made when they are read.

    A picture's label is the class of its larger part. With ``masks``, what is read are the masks: the class of each
    pixel, [32, 32] in mode L. Raises DataError for a size below 1.
    """
    count = cfg["sizes"][split]
    if not isinstance(count, int) or count < 1:
        raise DataError(f"data.sizes.{split}={count} must be a whole number of at least 1.")
    images = load_demo({}, split)
    mosaic = Mosaic(images, draw(images.labels, count, cfg["seed"], split))
    return ImageData(
        cfg["name"], split, images.class_names, mosaic.labels(), [f"mosaic-{split}-{i:05d}" for i in range(count)],
        mosaic.mask if masks else mosaic.picture, mosaic.content(), sibling_groups=images.sibling_groups,
    )  # fmt: skip


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
