"""Any Hugging Face data set of images: downloaded with random access, or streamed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sae_lightning.data.columns import Columns, captions, find_columns, pictures, row_id
from sae_lightning.data.errors import DataError, tell
from sae_lightning.data.hf_source import OpenedData, open_source
from sae_lightning.data.images import ImageData, data_source
from sae_lightning.data.splits import (
    UNLABELLED,
    as_text,
    checked_limit,
    choose_splits,
    class_name,
    cut,
    missing_splits,
    positions,
    sorted_names,
    tell_blank,
    tell_unseen,
    train_share,
    without_withheld,
)
from sae_lightning.data.stream import ImageStream, StreamCut


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


@data_source("hf")
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
    part = Part(split, opened, names, columns, held_out, cfg["seed"])
    return part.stream(checked_limit(cfg.get("limit")), cfg.get("config")) if cfg.get("streaming") else part.images()


def _columns(opened: OpenedData, names: Mapping[str, str], split: str, cfg: Mapping[str, Any]) -> Columns:
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


@dataclass(frozen=True)
class Part:
    """One of our splits of the data set: ``names`` are the data set's own of ours, ``held_out`` what is cut from it."""

    split: str
    opened: OpenedData
    names: Mapping[str, str]
    columns: Columns
    held_out: Mapping[str, float]
    seed: int

    @property
    def source(self) -> str:
        """The data set's own split."""
        return self.names[self.split]

    def images(self) -> ImageData:
        """Random access to the data set in the library's cache; ids are ``<split of the data set>-<row>``."""
        data, columns = self.opened.splits[self.source], self.columns
        labels, classes = self.labels()
        mark = json.dumps([self.opened.mark, self.source, columns.image, columns.label])
        images = ImageData(
            self.opened.name, self.split, classes, labels, [row_id(self.source, row) for row in range(len(data))],
            pictures(data, columns.image), mark.encode(),
            captions(data, columns.caption) if columns.caption else None,
        )  # fmt: skip
        return images.take(cut(labels, self.held_out, self.split, self.seed)) if self.held_out else images

    def labels(self) -> tuple[np.ndarray, list[str]]:
        """Labels [n] int64, and class names that are the same for all splits."""
        splits, label = self.opened.splits, self.columns.label
        if label is None:
            return np.zeros(len(splits[self.source]), dtype=np.int64), [UNLABELLED]
        having = {s: splits[s] for s in dict.fromkeys(self.names.values()) if label in splits[s].column_names}
        return common_labels(having, label, self.opened.name, self.names["train"], self.source, self.split)

    def stream(self, limit: int | None, config: str | None) -> ImageStream:
        """The split as a stream; its fingerprint is of what chooses the images, not of the images."""
        opened, source, label = self.opened, self.source, self.columns.label
        data = opened.splits[source].decode(False)
        classes: list[str] | None = [UNLABELLED]
        places, train = None, None
        if label is not None:
            own = declared_names(data.features[label])
            declared = [declared_names((opened.splits[s].features or {}).get(label)) for s in self.names.values()]
            classes = merged(declared) if own else None
            places = [classes.index(name) for name in own] if classes else None
            train = (
                None if source == self.names["train"] else opened.splits[self.names["train"]].select_columns([label])
            )
        share = StreamCut.of(self.held_out, self.split, self.seed) if self.held_out else None
        known = (data.info.splits or {}).get(source)
        count = known.num_examples if known is not None and share is None else None
        chosen = [opened.mark, config, source, self.split, repr(self.columns), repr(share), limit]
        return ImageStream(
            opened.name, self.split, data.select_columns(self.columns.all), self.columns, source, classes,
            length=count, fingerprint=hashlib.sha256(json.dumps(chosen).encode()).hexdigest(), cut=share, limit=limit,
            places=places, train=train, files=opened.files.get(source, ()),
        )  # fmt: skip
