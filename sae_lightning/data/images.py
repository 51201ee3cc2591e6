"""The one interface of every image source: labelled pictures of one split."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

SPLITS = ("train", "val", "test")


class DataError(ValueError):
    """An image source that is missing, incomplete or unreadable."""


class ImageData(Dataset):
    """Labelled images of one split; ``data[i]`` is an RGB PIL image.

    ``labels`` [n] int64 index ``class_names``; ``image_ids`` are unique and stable; ``captions`` holds
    one sentence an image or is None; ``sibling_groups`` maps a group's name to its class names.
    ``read(i)`` returns image i as bytes, a path or a PIL image; ``content(i)`` something that
    changes when the image does (by default its id), for the fingerprint.
    """

    def __init__(
        self,
        name: str,
        split: str,
        class_names: Sequence[str],
        labels: Sequence[int] | np.ndarray,
        image_ids: Sequence[str],
        read: Callable[[int], Any],
        content: Callable[[int], bytes] | None = None,
        captions: Sequence[str] | None = None,
        sibling_groups: dict[str, list[str]] | None = None,
    ) -> None:
        self.name, self.split = name, split
        self.class_names = list(class_names)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.image_ids = list(image_ids)
        self.captions = list(captions) if captions is not None else None
        self.sibling_groups = sibling_groups or {}
        self._read, self._content = read, content
        if len(self.labels) == 0:
            raise DataError(f"The {split} split of '{name}' has no images.")
        if len(set(self.image_ids)) != len(self.labels):
            raise DataError(f"The {split} split of '{name}' has {len(self.labels)} labels but "
                            f"{len(set(self.image_ids))} different image ids.")  # fmt: skip
        if not (self.labels.min() >= 0 and self.labels.max() < len(self.class_names)):
            raise DataError(
                f"Labels of '{name}' span {self.labels.min()} to {self.labels.max()}, "
                f"but it names {len(self.class_names)} classes."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Image.Image:
        if not 0 <= index < len(self):
            raise IndexError(f"Image {index} of {len(self)}.")
        source = self._read(index)
        try:
            picture = source if isinstance(source, Image.Image) else Image.open(_stream(source))
            return picture.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(
                f"Image '{self.image_ids[index]}' of '{self.name}' cannot be read ({error}); "
                "remove it or replace it by a whole copy."
            ) from error

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of ids, labels and what ``content`` says of each image."""
        digest = hashlib.sha256(f"{self.name}/{self.split}/{self.class_names}".encode())
        digest.update(self.labels.tobytes())
        for index, image_id in enumerate(self.image_ids):
            digest.update(image_id.encode())
            if self._content is not None:
                digest.update(self._content(index))
        return digest.hexdigest()


def _stream(source: Any) -> Any:
    return io.BytesIO(source) if isinstance(source, bytes | bytearray) else source


def check_split(split: str) -> None:
    """DataError unless ``split`` is train, val or test."""
    if split not in SPLITS:
        raise DataError(f"Unknown split '{split}'; choose one of {', '.join(SPLITS)}.")


def split_indices(labels: np.ndarray, shares: dict[str, float], seed: int) -> dict[str, np.ndarray]:
    """Disjoint, stratified, seeded parts of ``range(len(labels))``: each class is divided by ``shares``."""
    rng = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in shares}
    edges = np.cumsum(list(shares.values()))[:-1]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.round(edges * len(members)).astype(int)
        for name, piece in zip(shares, np.split(members, cuts), strict=True):
            parts[name].append(piece)
    return {name: np.sort(np.concatenate(pieces)) for name, pieces in parts.items()}
