"""Where masks come from: ``load_masks(cfg.data, split)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_lightning.data.arrange import arrange
from sae_lightning.data.decode import Source
from sae_lightning.data.errors import DataError
from sae_lightning.data.folder import load_folder
from sae_lightning.data.hf import load_hf
from sae_lightning.data.images import ImageData
from sae_lightning.data.masks import Masks
from sae_lightning.data.mosaic import load_mosaic_masks
from sae_lightning.data.splits import check_split
from sae_lightning.data.stream import ImageStream


def load_masks(data: Mapping[str, Any], split: str, transform: Any = None) -> Masks:
    """The masks of ``load_images(data, split)`` in the same order, as an encoder with this ``transform`` sees them.

    They come with ``source=mosaic``, from the column ``mask_column`` of an hf data set, or for ``source=folder`` as
    ``<mask_folder>/….png`` beside ``<image_folder>/….jpg``. Raises DataError for sources without masks, and with a
    sentence for what is missing.
    """
    check_split(split)
    cfg = dict(data)
    source = cfg["source"]
    if source == "mosaic":
        images = arrange(load_mosaic_masks(cfg, split), cfg)
        return Masks(images.name, split, images.class_names, images.image_ids, Sources(images), transform=transform)
    read: Callable[[int], Source]
    if source == "hf" and cfg.get("mask_column"):
        images = _column(cfg, split)
        read = Sources(images)
    elif source == "folder" and cfg.get("mask_folder"):
        images = arrange(load_folder(cfg, split), cfg)
        read = Beside(cfg["path"], images.image_ids, cfg["image_folder"], cfg["mask_folder"])
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


class Sources:
    """Picture i of ``images``, undecoded."""

    def __init__(self, images: ImageData) -> None:
        self.images = images

    def __call__(self, index: int) -> Source:
        return self.images.item(index).image


class Beside:
    """The path of the mask of picture ``paths[i]``: the folder ``masks`` in place of ``images``, and a PNG."""

    def __init__(self, root: str, paths: Sequence[str], images: str, masks: str) -> None:
        self.root, self.paths, self.images, self.masks = Path(root).expanduser(), paths, images, masks

    def __call__(self, index: int) -> Path:
        path = Path(self.paths[index])
        if not path.is_relative_to(self.images):
            raise DataError(f"Picture {path} does not lie in data.image_folder={self.images}; correct it.")
        return (self.root / self.masks / path.relative_to(self.images)).with_suffix(".png")
