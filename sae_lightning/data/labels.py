"""Labels as a data set has them, names or numbers, made into indices of class names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

UNLABELLED = "unlabelled"  # the one class of images without labels


def sorted_names(values: Iterable[object]) -> list[str]:
    """Different labels as class names: in numerical order if all are whole numbers, else by text."""
    names = {str(value) for value in values}
    try:
        return sorted(names, key=lambda name: (int(name), name))
    except ValueError:
        return sorted(names)


def as_text(labels: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Labels [n] as texts; missing ones stay missing."""
    text = labels.cast(pa.string())
    return text.combine_chunks() if isinstance(text, pa.ChunkedArray) else text


def positions(labels: pa.Array, class_names: Sequence[str]) -> np.ndarray:
    """The place [n] int64 of each label (a text) among the class names, all of which are known."""
    return pc.index_in(labels, value_set=pa.array(class_names, pa.string())).to_numpy().astype(np.int64)
