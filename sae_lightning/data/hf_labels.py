"""The labels of a Hugging Face data set's splits, told by name, so that a class has one number in all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sae_lightning.data.errors import DataError
from sae_lightning.data.labels import (
    as_text,
    class_name,
    positions,
    sorted_names,
    tell_blank,
    tell_unseen,
    without_withheld,
)


def declared_names(kind: Any) -> list[str]:
    """The classes that a feature declares, in its order; none for one that declares nothing."""
    return [class_name(name) for name in getattr(kind, "names", None) or ()]


def merged(lists: Iterable[Iterable[str]]) -> list[str]:
    """All names, each once, where it comes first."""
    return list(dict.fromkeys(chain.from_iterable(lists)))


@dataclass(frozen=True)
class SplitLabels:
    """The labels of one split: ``texts`` [n], missing where there is none, and the ``declared`` names, if any.

    ``bare`` tells numbers without names from names.
    """

    texts: pa.Array
    declared: list[str]
    bare: bool

    @classmethod
    def of(cls, data: Any, column: str, where: str) -> SplitLabels:
        """Those of a Dataset; DataError for numbers that are not whole, or above the last declared class."""
        held = data.select_columns([column]).with_format("arrow")[:][column].combine_chunks()
        names = declared_names(data.features[column])
        if not names:
            text = as_text(held, f"Column '{column}' of '{where}'")
            return cls(text, [], not pa.types.is_string(held.type) and not pa.types.is_large_string(held.type))
        if (pc.max(held).as_py() or 0) >= len(names):
            raise DataError(
                f"Column '{column}' of '{where}' has label {pc.max(held)}, but names {len(names)} classes, counted "
                "from 0; correct it, or take another data.label_column."
            )
        known = pc.if_else(pc.less(held, 0), pa.scalar(None, held.type), held)
        return cls(pa.array(names, pa.string()).take(known), names, False)

    @cached_property
    def present(self) -> list[str]:
        """The names that occur."""
        return pc.unique(self.texts).drop_null().to_pylist()


def common_labels(
    splits: Mapping[str, Any], column: str, where: str, train: str, source: str, split: str
) -> tuple[np.ndarray, list[str]]:
    """Labels [n] int64 of ``splits[source]``, and the class names of all ``splits``, which hold ``column``.

    Declared classes keep train's order, and what other splits add comes after; others are sorted. DataError when images
    have no label; what stands for a withheld one is none, unless it is a class of train.
    """
    found = {name: SplitLabels.of(data, column, where) for name, data in splits.items()}
    of_train = found[train].declared or found[train].present
    texts = {name: without_withheld(labels.texts, of_train) for name, labels in found.items()}
    names = _class_names(found, texts, column, where, train)
    missing = texts[source].null_count
    if missing:
        row = pc.index(texts[source].is_null(), True).as_py()
        instead = "another data.label_column" if source == train else f"data.splits.{split}={train}"
        raise DataError(
            f"{missing} of {len(texts[source])} images of split '{source}' of '{where}' have no label, as in a "
            f"challenge's test split (first: row {row}); take {instead} in its place, or data.label_column=none."
        )
    tell_blank(where, found[train].present)
    if source != train:
        tell_unseen(where, source, found[source].present, found[train].present)
    return positions(texts[source], names), names


def _class_names(
    found: Mapping[str, SplitLabels], texts: Mapping[str, pa.Array], column: str, where: str, train: str
) -> list[str]:
    named = merged(labels.declared for labels in found.values())
    bare = next((s for s, labels in found.items() if labels.bare and not set(labels.present) <= set(named)), None)
    if named and bare is not None:
        raise DataError(
            f"Column '{column}' of '{where}' names its classes in some splits and has bare numbers in split '{bare}'; "
            "give all of them the names, or take another data.label_column."
        )
    present = {name: pc.unique(text).drop_null().to_pylist() for name, text in texts.items()}
    if not found[train].declared:
        return sorted_names(merged(present.values()))
    return merged(labels.declared or present[name] for name, labels in found.items())
