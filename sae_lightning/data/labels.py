"""Labels as a data set has them, names or numbers, made into indices of class names."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sae_lightning.data.errors import DataError, tell

UNLABELLED = "unlabelled"  # the one class of images without labels
WITHHELD = ("-1", "")  # what stands for a label that is not given, unless train has such a class


def class_name(label: object) -> str:
    """A label as the name of its class: composed Unicode (NFC), so that é is é however it was typed; 2.0 is 2."""
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return unicodedata.normalize("NFC", str(label))


def sorted_names(values: Iterable[object]) -> list[str]:
    """Different labels as class names: in numerical order if all are whole numbers, else by text."""
    names = {str(value) for value in values}
    try:
        return sorted(names, key=lambda name: (int(name), name))
    except ValueError:
        return sorted(names)


def as_text(labels: pa.Array | pa.ChunkedArray, column: str) -> pa.Array:
    """Labels [n] as names of classes; missing ones stay missing, NaN is missing, whole-valued floats are numbers.

    DataError naming ``column`` when floats are not whole.
    """
    if isinstance(labels, pa.ChunkedArray):
        labels = labels.combine_chunks()
    if pa.types.is_floating(labels.type):
        labels = labels.cast(pa.float64())
        labels = pc.if_else(pc.is_nan(labels), pa.scalar(None, pa.float64()), labels)
        try:
            labels = labels.cast(pa.int64())
        except pa.ArrowInvalid as error:
            broken = next(x for x in labels.to_pylist() if x is not None and not float(x).is_integer())
            raise DataError(
                f"{column} holds {broken:g}; numbers that are labels must be whole. Name another column with "
                "data.label_column, or say data.label_column=none."
            ) from error
    return pc.utf8_normalize(labels.cast(pa.string()), "NFC")


def positions(labels: pa.Array, class_names: Sequence[str]) -> np.ndarray:
    """The place [n] int64 of each label (a text) among the class names, all of which are known."""
    return pc.index_in(labels, value_set=pa.array(class_names, pa.string())).to_numpy().astype(np.int64)


def without_withheld(labels: pa.Array, of_train: Iterable[str]) -> pa.Array:
    """Labels [n] (texts), those that are withheld made missing: -1 and empty, where train has no such class."""
    classes = set(of_train)
    withheld = [text for text in pc.unique(labels).to_pylist() if text is not None and text.strip() in WITHHELD]
    none = pa.array([text for text in withheld if text not in classes], pa.string())
    return pc.if_else(pc.is_in(labels, none), pa.scalar(None, pa.string()), labels) if len(none) else labels


def tell_blank(where: str, of_train: Iterable[str]) -> None:
    """Say that some labels of train are empty: a class like any other, but hardly a meant one."""
    if any(not label.strip() for label in of_train):
        tell(f"Some labels in the train split of '{where}' are empty; they are taken for a class of their own.")


def tell_unseen(where: str, split: str, labels: Iterable[str], of_train: Iterable[str]) -> None:
    """Say which classes of ``split`` train lacks."""
    unseen = sorted_names(set(labels) - set(of_train))
    if unseen:
        tell(
            f"Of the classes in the {split} split of '{where}', train lacks {len(unseen)}: "
            f"{', '.join(unseen[:10])}{' …' if len(unseen) > 10 else ''}."
        )
