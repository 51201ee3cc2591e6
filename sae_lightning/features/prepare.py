"""From images to batches of an encoder's input; what cannot be one says so by name and leaves the others alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from sae_lightning.data import DataError, ImageData
from sae_lightning.data.errors import brief, gathering


class Sample(NamedTuple):
    """An encoder's ``input``, or why it is none, and what is to be ``said`` of such pictures."""

    input: Tensor | DataError
    said: dict[str, str]


# pixels [n, 3, H, W] of the readable images, what is wrong with the others by position, what to say
Collated = tuple[Tensor | None, dict[int, DataError], dict[str, str]]


class Takes(Protocol):
    """What is asked of a Backbone here."""

    @property
    def image_size(self) -> int: ...

    @property
    def transform(self) -> Callable[[Image.Image], Tensor]: ...


def prepare(read: Callable[[], Image.Image], image_id: str, encoder: Takes) -> Sample:
    """The picture that ``read`` gives as the input of ``encoder``."""
    with gathering() as said:
        try:
            return Sample(_prepared(read, image_id, encoder), said)
        except DataError as error:
            return Sample(error, said)


def _prepared(read: Callable[[], Image.Image], image_id: str, encoder: Takes) -> Tensor:
    try:
        pixels = encoder.transform(read())
    except DataError:
        raise
    except Exception as error:  # libraries raise all sorts, MemoryError too
        raise DataError(
            f"Image '{image_id}' cannot be read or resized ({type(error).__name__}: {brief(error)}); remove it or "
            "replace it by a whole copy."
        ) from error
    size = encoder.image_size
    if pixels.shape != (3, size, size):
        raise DataError(
            f"Image '{image_id}' becomes {list(pixels.shape)} where the encoder takes {[3, size, size]}: its image "
            "processor keeps the picture's shape. Cut the pictures, or let do_center_crop in "
            "preprocessor_config.json do it."
        )
    return pixels


class Pictures(Dataset):
    """Images as the input of ``encoder``."""

    def __init__(self, images: ImageData, encoder: Takes) -> None:
        self.images, self.encoder = images, Input(encoder.image_size, encoder.transform)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return prepare(lambda: self.images[index], self.images.image_ids[index], self.encoder)


class Input(NamedTuple):
    """An encoder without its weights, for workers."""

    image_size: int
    transform: Callable[[Image.Image], Tensor]


def collate(samples: Sequence[Sample]) -> Collated:
    """One batch of ``samples``."""
    errors = {i: sample.input for i, sample in enumerate(samples) if isinstance(sample.input, DataError)}
    said = {kind: said for sample in reversed(samples) for kind, said in sample.said.items()}  # the first of each
    pixels = [sample.input for sample in samples if isinstance(sample.input, Tensor)]
    return torch.stack(pixels) if pixels else None, errors, said
