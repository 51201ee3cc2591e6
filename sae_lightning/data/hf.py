"""Any Hugging Face data set of images: downloaded with random access, or streamed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from sae_lightning.data.arrange import checked_limit
from sae_lightning.data.columns import Columns, find_columns
from sae_lightning.data.errors import DataError, tell
from sae_lightning.data.hf_labels import common_labels, declared_names, merged
from sae_lightning.data.hf_rows import Captions, Pictures, row_id
from sae_lightning.data.hf_source import Opened, open_source
from sae_lightning.data.images import ImageData
from sae_lightning.data.labels import UNLABELLED
from sae_lightning.data.splits import choose_splits, cut, missing_splits, train_share
from sae_lightning.data.stream import ImageStream
from sae_lightning.data.stream_cut import StreamCut
from sae_lightning.data.texts import Texts


def load_hf(cfg: dict[str, Any], split: str) -> ImageData | ImageStream:
    """``split`` of the data set ``id`` (on the hub or a local path); an ImageStream if ``streaming``.

    ``splits`` maps train, val and test to the data set's own names; null finds a usual one, and where there is
    none (or the name is that of train) a share ``held_out`` is cut from train. Columns are found by name and
    type unless given; without labels all images are of one class, "unlabelled". Raises DataError.
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
    columns = _columns(opened, names, split, cfg)
    if cfg.get("streaming"):
        return _stream(cfg, split, opened, names, columns, held_out)
    return _images(cfg, split, opened, names, columns, held_out)


def _columns(opened: Opened, names: Mapping[str, str], split: str, cfg: Mapping[str, Any]) -> Columns:
    """Those of the split, with the label that train has; says so when there is none."""
    source, train = names[split], names["train"]
    columns = find_columns(opened.splits[source].features, cfg, opened.name)
    of_train = find_columns(opened.splits[train].features or opened.splits[source].features, cfg, opened.name)
    label = of_train.label
    if label is not None and label not in opened.splits[source].features:
        raise DataError(
            f"Split '{source}' of '{opened.name}' has no column '{label}', which holds the labels of train; set "
            f"data.splits.{split}={train} to cut one from train, or say data.label_column=none."
        )
    if label is None and of_train.passed_over is not None:
        others = ", ".join(of_train.passed_over)
        tell(
            f"'{opened.name}' is read without labels, all images as of one class; "
            f"{f'passed over: {others}' if others else 'it has no other columns'}. Name a column with "
            "data.label_column, or say data.label_column=none."
        )
    return replace(columns, label=label)


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
    labels, classes = _labels(opened, names, split, columns)
    mark = json.dumps([opened.mark, source, columns.image, columns.label])
    captions = Texts(Captions(data, columns.caption), np.arange(len(data))) if columns.caption else None
    images = ImageData(
        opened.name, split, classes, labels, [row_id(source, row) for row in range(len(data))],
        Pictures(data, columns.image), mark.encode(), captions,
    )  # fmt: skip
    return images.take(cut(labels, held_out, split, cfg["seed"])) if held_out else images


def _labels(opened: Opened, names: Mapping[str, str], split: str, columns: Columns) -> tuple[np.ndarray, list[str]]:
    """Labels [n] int64 of ``split``, and class names that are the same for all splits."""
    if columns.label is None:
        return np.zeros(len(opened.splits[names[split]]), dtype=np.int64), [UNLABELLED]
    used = dict.fromkeys(names.values())
    having = {s: opened.splits[s] for s in used if columns.label in opened.splits[s].column_names}
    return common_labels(having, columns.label, opened.name, names["train"], names[split], split)


def _stream(
    cfg: Mapping[str, Any],
    split: str,
    opened: Opened,
    names: Mapping[str, str],
    columns: Columns,
    held_out: Mapping[str, float],
) -> ImageStream:
    """The split as a stream; its fingerprint is of what chooses the images, not of the images."""
    source, label = names[split], columns.label
    data = opened.splits[source].decode(False)
    classes: list[str] | None = [UNLABELLED]
    places, train = None, None
    if label is not None:
        own = declared_names(data.features[label])
        declared = [declared_names((opened.splits[s].features or {}).get(label)) for s in names.values()]
        classes = merged(declared) if own else None
        places = [classes.index(name) for name in own] if classes else None
        train = None if source == names["train"] else opened.splits[names["train"]].select_columns([label])
    share = StreamCut.of(held_out, split, cfg["seed"]) if held_out else None
    limit = checked_limit(cfg.get("limit"))
    known = (data.info.splits or {}).get(source)
    count = known.num_examples if known is not None and share is None else None
    chosen = [opened.mark, cfg.get("config"), source, split, repr(columns), repr(share), limit]
    return ImageStream(
        opened.name, split, data.select_columns(columns.all), columns, source, classes, length=count,
        fingerprint=hashlib.sha256(json.dumps(chosen).encode()).hexdigest(), cut=share, limit=limit, places=places,
        train=train, files=opened.files.get(source, ()),
    )  # fmt: skip
