"""Where an encoder's transform takes each pixel from: its resizing and cropping, without its filters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from sae_lightning.data.errors import DataError

OUTSIDE = -1  # of positions that padding made

Axes = tuple[np.ndarray, np.ndarray]
Step = Callable[[Axes], Axes]


def steps_of(transform: Any) -> list[Step]:
    """What ``transform`` (of torchvision or timm) does to the rows and columns of a picture; nothing for None.

    ``Resize`` and ``CenterCrop`` are known, of crops also one that is ``upper_left`` of two middles, and steps that
    leave pixels where they are. DataError for others.
    """
    if transform is None:
        return []
    from torchvision import transforms  # which takes seconds

    pixelwise = (transforms.ToTensor, transforms.PILToTensor, transforms.ConvertImageDtype, transforms.Normalize)
    if hasattr(transform, "transforms"):  # a Compose, or something that tells its steps as one
        return [step for part in transform.transforms for step in steps_of(part)]
    if isinstance(transform, transforms.Resize) and transform.max_size is None:
        return [_resizing(transform.size)]
    if isinstance(transform, transforms.CenterCrop):
        height, width = transform.size
        return [_cropping(height, width, _middle if getattr(transform, "upper_left", False) else _centre)]
    if isinstance(transform, pixelwise):
        return []
    raise DataError(
        f"Masks cannot follow the step {transform} of the encoder's transform; only Resize and CenterCrop are known. "
        "Choose an encoder that prepares its pictures so."
    )


def through(steps: list[Step], height: int, width: int) -> Axes:
    """Rows [h] and columns [w] int64 of a picture [height, width] that its transformed version takes its pixels from.

    Those that padding adds are -1.
    """
    axes = np.arange(height), np.arange(width)
    for step in steps:
        axes = step(axes)
    return axes


def seen(image: Image.Image, transform: Any) -> Image.Image:
    """The part of a picture that ``transform`` makes an encoder's input of, in the picture's own pixels.

    It is squeezed to a square as the input is, and black where that is padded. DataError as ``steps_of``.
    """
    rows, columns = (_span(axis) for axis in through(steps_of(transform), image.height, image.width))
    part = image.crop((columns[0], rows[0], columns[1], rows[1]))
    side = min(part.size)
    return part if part.width == part.height else part.resize((side, side), Image.Resampling.LANCZOS)


def _span(axis: np.ndarray) -> tuple[int, int]:
    """Where the pixels of ``axis`` begin and end in the picture; beyond it where they are padded."""
    inside = np.flatnonzero(axis != OUTSIDE)
    first, last = int(inside[0]), int(inside[-1])
    low, high = int(axis[first]), int(axis[last]) + 1
    pixel = (high - low) / len(inside)
    return round(low - first * pixel), round(high + (len(axis) - 1 - last) * pixel)


def nearest(size: int, target: int) -> np.ndarray:
    """The pixel of ``size`` whose interval the centre of each of ``target`` pixels falls in, [target] int64."""
    return ((2 * np.arange(target) + 1) * size // (2 * target)).astype(np.int64)


def _resizing(size: int | list[int] | tuple[int, ...]) -> Step:
    """To height and width, or if there is one number, the shorter edge to it and the longer in proportion."""
    both = [size] if isinstance(size, int) else list(size)

    def resize(axes: Axes) -> Axes:
        shape = [len(axis) for axis in axes]
        target = both if len(both) == 2 else [int(both[0] * length / min(shape)) for length in shape]
        rows, columns = (axis[nearest(len(axis), new)] for axis, new in zip(axes, target, strict=True))
        return rows, columns

    return resize


def _cropping(height: int, width: int, cut: Callable[[np.ndarray, int], np.ndarray]) -> Step:
    def crop(axes: Axes) -> Axes:
        rows, columns = (cut(axis, new) for axis, new in zip(axes, (height, width), strict=True))
        return rows, columns

    return crop


def _middle(axis: np.ndarray, size: int) -> np.ndarray:
    """The ``size`` positions, of two middles the upper left one, and nothing beyond the picture."""
    places = (len(axis) - size) // 2 + np.arange(size)
    inside = (places >= 0) & (places < len(axis))
    return np.where(inside, axis[places.clip(0, len(axis) - 1)], OUTSIDE)


def _centre(axis: np.ndarray, size: int) -> np.ndarray:
    """The middle ``size`` positions of ``axis``, padded as torchvision pads where there are fewer."""
    if len(axis) < size:
        before = (size - len(axis)) // 2
        axis = np.pad(axis, (before, size - len(axis) - before), constant_values=OUTSIDE)
    start = round((len(axis) - size) / 2.0)
    return axis[start : start + size]
