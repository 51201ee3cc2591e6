"""Any Hugging Face data set of images: downloaded with random access, or streamed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sae_lightning.data.arrange import checked_limit
from sae_lightning.data.columns import Columns, find_columns
from sae_lightning.data.errors import DataError
from sae_lightning.data.hf_rows import Captions, Pictures, row_id
from sae_lightning.data.hf_source import Opened, open_source
from sae_lightning.data.images import ImageData
from sae_lightning.data.labels import UNLABELLED, as_text, positions, sorted_names
from sae_lightning.data.splits import choose_splits, cut, missing_splits, train_share
from sae_lightning.data.stream import ImageStream
from sae_lightning.data.stream_cut import StreamCut
from sae_lightning.data.texts import Texts


def load_hf(cfg: dict[str, Any], split: str) -> ImageData | ImageStream:
    """``split`` of the data set ``id`` (on the hub or a local path); an ImageStream if ``streaming``.

    ``splits`` maps train, val and test to the data set's own names; null finds a usual one, and where there is
    none (or the name is that of train) a share ``held_out`` is cut from train. Columns are found by type and
    name unless given; without labels all images are of one class, "unlabelled". Raises DataError.
    """
    opened = open_source(cfg)
    names = choose_splits(cfg["splits"], opened.splits, f"'{opened.name}'")
    held_out = dict.fromkeys(missing_splits(names), float(cfg["held_out"]))
    train_share(held_out)
    if split not in ("train", *held_out) or (split == "train" and not cfg["held_out"]):
        held_out = {}  # the split is one of the data set's own, whole
    data = opened.splits[names[split]]
    if data.features is None:
        raise DataError(f"'{opened.name}' does not say what its columns hold, so it cannot be streamed; "
                        "set data.streaming=false.")  # fmt: skip
    columns = find_columns(data.features, cfg, opened.name)
    if cfg.get("streaming"):
        return _stream(cfg, split, opened, names[split], columns, held_out)
    return _images(cfg, split, opened, names, columns, held_out)


def _images(
    cfg: Mapping[str, Any],
    split: str,
    opened: Opened,
    names: Mapping[str, str],
    columns: Columns,
    held_out: Mapping[str, float],
) -> ImageData:
    """Random access to the data set in the library's cache; ids are ``<split of the data set>-<row>``."""
    source = names[split]
    data = opened.splits[source]
    labels, classes = _labels(opened, names, source, columns)
    mark = json.dumps([opened.mark, source, columns.image, columns.label])
    captions = Texts(Captions(data, columns.caption), np.arange(len(data))) if columns.caption else None
    images = ImageData(
        opened.name, split, classes, labels, [row_id(source, row) for row in range(len(data))],
        Pictures(data, columns.image), mark.encode(), captions,
    )  # fmt: skip
    return images.take(cut(labels, held_out, split, cfg["seed"])) if held_out else images


def _labels(opened: Opened, names: Mapping[str, str], source: str, columns: Columns) -> tuple[np.ndarray, list[str]]:
    """Labels [n] int64 of the split ``source``, and class names that are the same for all splits."""
    import datasets

    data = opened.splits[source]
    if columns.label is None:
        return np.zeros(len(data), dtype=np.int64), [UNLABELLED]
    kind = data.features[columns.label]
    column = _column(data, columns.label)
    is_class = isinstance(kind, datasets.ClassLabel)
    if column.null_count or (is_class and (pc.min(column).as_py() or 0) < 0):
        instead = "another data.label_column" if source == names["train"] else f"data.splits with '{names['train']}'"
        raise DataError(
            f"Images of split '{source}' of '{opened.name}' have no label, as in a challenge's test split; take "
            f"{instead} in its place."
        )
    if is_class:
        return column.to_numpy().astype(np.int64), list(kind.names)
    labelled = [opened.splits[s] for s in set(names.values()) if columns.label in opened.splits[s].column_names]
    present = [pc.unique(as_text(_column(other, columns.label))).drop_null() for other in labelled]
    classes = sorted_names(name for names_there in present for name in names_there.to_pylist())
    return positions(as_text(column), classes), classes


def _column(data: Any, column: str) -> pa.ChunkedArray:
    return data.select_columns([column]).with_format("arrow")[:][column]


def _stream(
    cfg: Mapping[str, Any], split: str, opened: Opened, source: str, columns: Columns, held_out: Mapping[str, float]
) -> ImageStream:
    """The split as a stream; its fingerprint is of what chooses the images, not of the images."""
    import datasets

    data = opened.splits[source].decode(False)
    kind = data.features[columns.label] if columns.label else None
    classes = [UNLABELLED] if kind is None else list(kind.names) if isinstance(kind, datasets.ClassLabel) else None
    share = StreamCut.of(held_out, split, cfg["seed"]) if held_out else None
    limit = checked_limit(cfg.get("limit"))
    known = (data.info.splits or {}).get(source)
    count = known.num_examples if known is not None and share is None else None
    chosen = [opened.name, opened.mark, cfg.get("config"), source, split, repr(columns), repr(share), limit]
    return ImageStream(
        opened.name, split, data.select_columns(columns.all), columns, source, classes,
        length=count, fingerprint=hashlib.sha256(json.dumps(chosen).encode()).hexdigest(), cut=share, limit=limit,
    )  # fmt: skip
