"""The one interface of every image source with random access: labelled pictures of one split."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import repeat
from typing import Any, overload

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from sae_lightning.data.contents import Contents
from sae_lightning.data.decode import Item, Source, to_rgb
from sae_lightning.data.errors import DataError
from sae_lightning.data.levels import AS_FILED, Reading
from sae_lightning.registry import Registry


class Texts(Sequence[str]):
    """``texts[i]`` is ``read(rows[i])``, of ``n`` rows where they are not given.

    ``read`` must be picklable for DataLoader workers: a function of a module with its first arguments (``partial``).
    """

    def __init__(self, read: Callable[[int], str], rows: np.ndarray | int) -> None:
        self._read, self._rows = read, np.arange(rows) if isinstance(rows, int) else rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Texts: ...
    def __getitem__(self, index: int | slice) -> str | Texts:
        if isinstance(index, slice):
            return Texts(self._read, self._rows[index])
        return self._read(int(self._rows[index]))

    def take(self, index: np.ndarray) -> Texts:
        """The texts ``index`` [m] (int64) in that order."""
        return Texts(self._read, self._rows[index])


def take_texts(texts: Iterable[str] | None, index: np.ndarray) -> Sequence[str] | None:
    """Those of ``texts`` at ``index`` [m]; still unread if they were."""
    if texts is None or isinstance(texts, Texts):
        return None if texts is None else texts.take(index)
    texts = list(texts)
    return [texts[i] for i in index]


class ImageData(Dataset):
    """Labelled images of one split; ``data[i]`` is an RGB PIL image, decoded as ``to_rgb`` says.

    ``labels`` [n] int64 index ``class_names``, words where wnids of ImageNet are given; ``image_ids`` are unique and
    stable; ``captions`` holds one sentence an image or is None; ``sibling_groups`` maps a group's name to its class
    names; ``reading``, which may be set later, says how channels and depths are read. ``read(i)`` returns
    image i undecoded; ``content`` is something that changes when the images do, for the fingerprint: bytes for all of
    them, a function that gives those of image i, or the files' contents. ``read`` is picklable, so that DataLoader
    workers can be forked or spawned. Raises DataError when labels, ids and classes disagree.
    """

    def __init__(
        self,
        name: str,
        split: str,
        class_names: Sequence[str],
        labels: Sequence[int] | np.ndarray,
        image_ids: Sequence[str],
        read: Callable[[int], Source],
        content: Callable[[int], bytes] | Contents | bytes | None = None,
        captions: Sequence[str] | None = None,
        sibling_groups: dict[str, list[str]] | None = None,
    ) -> None:
        self.name, self.split = name, split
        self._names, self.class_names = list(class_names), in_words(class_names)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.image_ids = list(image_ids)
        self.captions = captions
        self.sibling_groups = sibling_groups or {}
        self.reading: Reading = AS_FILED
        self._read, self._content = read, content
        self._rows = np.arange(len(self.labels))  # what read and content call the images
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
        return to_rgb(self._source(index), self.image_ids[index], self.reading)

    def item(self, index: int) -> Item:
        """Image ``index`` undecoded, with its id, label and caption; ``decode(item)`` gives ``data[index]``."""
        caption = self.captions[index] if self.captions is not None else None
        return Item(self._source(index), self.image_ids[index], int(self.labels[index]), caption, self.reading)

    def _source(self, index: int) -> Source:
        if not 0 <= index < len(self):
            raise IndexError(f"Image {index} of {len(self)}.")
        return self._read(int(self._rows[index]))

    def take(self, index: np.ndarray | Sequence[int] | slice) -> ImageData:
        """The images ``index`` (positions, a mask or a slice), in that order; nothing of the pictures is copied.

        DataError when none is left or one is taken twice.
        """
        chosen = np.arange(len(self))[index]
        if len(chosen) == 0 or np.bincount(chosen).max() > 1:
            raise DataError(f"Taking {len(chosen)} images of '{self.name}': each must be taken once, and at least one.")
        taken = copy.copy(self)
        taken.__dict__.pop("fingerprint", None)
        taken.labels, taken._rows = self.labels[chosen], self._rows[chosen]
        taken.image_ids = [self.image_ids[i] for i in chosen.tolist()]
        taken.captions = take_texts(self.captions, chosen)
        return taken

    def index_of(self, image_ids: Sequence[str]) -> np.ndarray:
        """Positions [m] int64 of the images of these ids; DataError names one that is not here."""
        where = {image_id: i for i, image_id in enumerate(self.image_ids)}
        unknown = next((i for i in image_ids if i not in where), None)
        if unknown is not None:
            raise DataError(f"The {self.split} split of '{self.name}' has no image '{unknown}'.")
        return np.array([where[i] for i in image_ids], dtype=np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of split, classes, and ids, labels and contents in their order: not of what the data are called,
        nor of where they lie."""
        digest = hashlib.sha256(f"{self.split}/{self._names}".encode())
        digest.update(self.labels.tobytes())
        if self.reading != AS_FILED:
            digest.update(repr(self.reading).encode())
        if isinstance(self._content, bytes):
            digest.update(self._content)
        each: Iterable[bytes] = repeat(b"", len(self))
        if isinstance(self._content, Contents):
            each = self._content.of(self._rows)
        elif callable(self._content):
            each = map(self._content, self._rows.tolist())
        for image_id, content in zip(self.image_ids, each, strict=True):
            digest.update(image_id.encode())
            digest.update(content)
        return digest.hexdigest()


WNID = re.compile(r"n\d{8}")


def in_words(class_names: Sequence[str], synonyms: bool = False) -> list[str]:
    """Class names, those that are wnids of ImageNet-1K as words: ``tench`` for ``n01440764``, or with all synonyms."""
    if not any(WNID.fullmatch(name) for name in class_names):
        return list(class_names)
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    words = {wnid: info.label_name_to_description(wnid, detailed=False) for wnid in info.label_names()}
    words = words if synonyms else {wnid: text.split(",")[0] for wnid, text in words.items()}
    return [words.get(name, name) for name in class_names]


data_source: Registry[Any] = Registry(
    "data.source", DataError
)  # functions of (settings, split) to ImageData or a stream
