"""Masks beside pictures: the class of every pixel, resized and cropped as the encoder does with the picture."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sae_lightning.data.bundled import load_mosaic
from sae_lightning.data.decode import Source
from sae_lightning.data.errors import DataError, brief
from sae_lightning.data.folder import load_folder
from sae_lightning.data.geometry import steps_of, through
from sae_lightning.data.huggingface import load_hf
from sae_lightning.data.images import ImageData
from sae_lightning.data.splits import arrange, check_split
from sae_lightning.data.stream import ImageStream

IGNORE = 255  # of pixels and patches without a class

MOST = 255  # classes: 0 to 254

THREADS = 4

Grid = tuple[int, int]  # rows and columns of patches


class PatchPixels(NamedTuple):
    """How many ``pixels`` of the class ``label`` lie in a ``patch``; all [m] int64, by patch, then class.

    ``patch`` counts through all images: image · P + place. What has no pixel is not listed.
    """

    patch: np.ndarray
    label: np.ndarray
    pixels: np.ndarray


class Masks:
    """Masks of images, in the order of ``image_ids``; ``mask(i)`` is [H, W] uint8, a class or 255 for none.

    ``read(i)`` returns mask i as something that Pillow opens, with one channel. In it, ``first`` stands for class 0,
    the next value for class 1 …; values below ``first``, and 255, are no class. ``transform`` is that of the encoder,
    whose resizing (here to the nearest pixel) and cropping every mask goes through; None leaves masks as they are.
    Raises DataError for more than 255 classes, and for steps of the transform that are not known.
    """

    def __init__(
        self,
        name: str,
        split: str,
        class_names: Sequence[str],
        image_ids: Sequence[str],
        read: Callable[[int], Source],
        first: int = 0,
        transform: Any = None,
    ) -> None:
        if not 0 < len(class_names) <= MOST:
            raise DataError(f"Masks of '{name}' have {len(class_names)} classes; 1 to {MOST} are possible.")
        self.name, self.split, self.class_names, self.first = name, split, list(class_names), first
        self.image_ids, self._read = list(image_ids), read
        self._rows = np.arange(len(self.image_ids))
        self._steps = steps_of(transform)
        self._pixels: dict[Grid, PatchPixels] = {}

    def __len__(self) -> int:
        return len(self.image_ids)

    def mask(self, index: int) -> np.ndarray:
        """Mask ``index`` as the encoder sees the picture, [H, W] uint8.

        DataError when it cannot be read, has several channels, or holds a value beyond the classes.
        """
        image_id = self.image_ids[index]
        values = class_map(self._read(int(self._rows[index])), image_id)
        rows, columns = through(self._steps, *values.shape)
        seen = values[np.ix_(rows, columns)].astype(np.int64) - self.first
        nothing = (seen < 0) | (seen == IGNORE - self.first) | (rows < 0)[:, None] | (columns < 0)
        beyond = seen[(seen >= len(self.class_names)) & ~nothing]
        if beyond.size:
            last = self.first + len(self.class_names) - 1
            raise DataError(
                f"The mask of image '{image_id}' of '{self.name}' holds {beyond[0] + self.first}, but its classes are "
                f"{self.first} to {last}; correct data.mask_classes or data.mask_first."
            )
        return np.where(nothing, IGNORE, seen).astype(np.uint8)

    def of(self, image_ids: Sequence[str]) -> Masks:
        """The masks of these images, in their order; itself if they are its own. DataError names one without."""
        if list(image_ids) == self.image_ids:
            return self
        where = {image_id: i for i, image_id in enumerate(self.image_ids)}
        unknown = next((i for i in image_ids if i not in where), None)
        if unknown is not None:
            raise DataError(
                f"The {self.split} split of '{self.name}' has no mask of image '{unknown}'; extract the features and "
                "load the masks with the same data config."
            )
        part = copy.copy(self)
        part.image_ids, part._pixels = list(image_ids), {}
        part._rows = self._rows[[where[i] for i in image_ids]]
        return part

    def patch_pixels(self, grid: Grid) -> PatchPixels:
        """The labelled pixels of all masks by patch of the ``grid``; counted once and kept."""
        if grid not in self._pixels:
            n_patches = grid[0] * grid[1]
            with ThreadPoolExecutor(THREADS) as pool:
                found = list(pool.map(lambda i: patch_pixels(self.mask(i), grid), range(len(self))))
            patch = np.concatenate([pixels.patch + i * n_patches for i, pixels in enumerate(found)])
            label, pixels = (np.concatenate(column) for column in list(zip(*found, strict=True))[1:])
            self._pixels[grid] = PatchPixels(patch, label, pixels)
        return self._pixels[grid]

    def patch_labels(self, grid: Grid) -> np.ndarray:
        """The majority class of every patch of every mask, [n, P] uint8; as ``patch_labels`` of one."""
        n_patches = grid[0] * grid[1]
        return majority(self.patch_pixels(grid), len(self) * n_patches).reshape(len(self), n_patches)


def class_map(source: Source, image_id: str) -> np.ndarray:
    """The values of a mask with one channel, [H, W] of whole numbers; of palette pictures their indices.

    DataError naming ``image_id`` when it is missing, broken, or has colours.
    """
    if isinstance(source, bytes) and not source:
        raise DataError(f"Image '{image_id}' has no mask; choose a split that has, with data.splits.")
    try:
        if isinstance(source, Image.Image):
            values, mode = np.asarray(source), source.mode
        else:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
                values, mode = np.asarray(picture), picture.mode
    except Exception as error:
        raise DataError(
            f"The mask of image '{image_id}' cannot be read ({brief(error)}); replace it by a whole copy."
        ) from error
    if values.ndim != 2 or values.dtype.kind == "f":
        raise DataError(
            f"The mask of image '{image_id}' has mode {mode}; expected one channel, whose values are classes."
        )
    return values


def patch_pixels(mask: np.ndarray, grid: Grid) -> PatchPixels:
    """The labelled pixels of ``mask`` [H, W] (values up to 254, 255 for none) by patch of the ``grid``.

    Where the grid does not divide the mask, a pixel belongs to the patch that its top left corner lies in.
    """
    (height, width), (rows, columns) = mask.shape, grid
    patch = (np.arange(height) * rows // height)[:, None] * columns + np.arange(width) * columns // width
    counts = np.bincount((patch * (MOST + 1) + mask).ravel(), minlength=rows * columns * (MOST + 1))
    counts = counts.reshape(rows * columns, MOST + 1)[:, :IGNORE]
    found, label = counts.nonzero()
    return PatchPixels(found, label, counts[found, label])


def majority(pixels: PatchPixels, n_patches: int) -> np.ndarray:
    """The class with most pixels of each of ``n_patches``, [n_patches] uint8: of equals the lowest, 255 for none."""
    labels = np.full(n_patches, IGNORE, dtype=np.uint8)
    order = np.lexsort((-pixels.label, pixels.pixels))  # what is written last stays
    labels[pixels.patch[order]] = pixels.label[order]
    return labels


def patch_labels(mask: np.ndarray, grid: Grid) -> np.ndarray:
    """The class of most labelled pixels in each patch, [rows · columns] uint8 in reading order; 255 without any."""
    return majority(patch_pixels(mask, grid), grid[0] * grid[1])


def load_masks(data: Mapping[str, Any], split: str, transform: Any = None) -> Masks:
    """The masks of ``load_images(data, split)`` in the same order, as an encoder with this ``transform`` sees them.

    They come with ``source=mosaic``, from the column ``mask_column`` of an hf data set, or for ``source=folder`` as
    ``<mask_folder>/….png`` beside ``<image_folder>/….jpg``. Raises DataError for sources without masks, and with a
    sentence for what is missing.
    """
    check_split(split)
    cfg = dict(data)
    source = cfg["source"]
    read: Callable[[int], Source]
    if source == "mosaic":
        images = arrange(load_mosaic(cfg, split, masks=True), cfg)
        read = partial(_undecoded, images)
        return Masks(images.name, split, images.class_names, images.image_ids, read, transform=transform)
    if source == "hf" and cfg.get("mask_column"):
        images = _column(cfg, split)
        read = partial(_undecoded, images)
    elif source == "folder" and cfg.get("mask_folder"):
        images = arrange(load_folder(cfg, split), cfg)
        root = Path(cfg["path"]).expanduser()
        read = partial(_beside, root, images.image_ids, cfg["image_folder"], cfg["mask_folder"])
    else:
        raise DataError(
            f"data={cfg.get('name')} has no masks. Take data=mosaic or data=ade20k, or name a Hugging Face data set's "
            "column of masks with data.mask_column, or the folder of masks beside the pictures with data.mask_folder."
        )
    first = int(cfg.get("mask_first") or 0)
    return Masks(images.name, split, class_names(cfg, first), images.image_ids, read, first, transform)


def class_names(cfg: Mapping[str, Any], first: int) -> list[str]:
    """``mask_classes``: a list of names, or how many there are, which are called as in the masks, from ``first`` on."""
    classes = cfg.get("mask_classes")
    if type(classes) is int:
        return [str(first + i) for i in range(classes)]
    if isinstance(classes, str) or not isinstance(classes, Sequence):
        raise DataError(f"data.mask_classes={classes} must be the number of classes or a list of their names.")
    return [str(name) for name in classes]


def _column(cfg: dict[str, Any], split: str) -> ImageData:
    """The data set with its masks for pictures, so that splits, limit and order are those of the pictures."""
    masks = load_hf(cfg | {"image_column": cfg["mask_column"]}, split)
    if isinstance(masks, ImageStream):
        raise DataError("Masks need random access to the data set; set data.streaming=false.")
    return arrange(masks, cfg)


def _undecoded(images: ImageData, index: int) -> Source:
    return images.item(index).image


def _beside(root: Path, paths: Sequence[str], images: str, masks: str, index: int) -> Path:
    """The mask of picture ``paths[index]``: in the folder ``masks`` in place of ``images``, and a PNG."""
    path = Path(paths[index])
    if not path.is_relative_to(images):
        raise DataError(f"Picture {path} does not lie in data.image_folder={images}; correct it.")
    return (root / masks / path.relative_to(images)).with_suffix(".png")
