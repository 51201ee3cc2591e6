"""Pictures in tar shards, as WebDataset packs them, with random access."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sae_lightning.data.contents import Contents
from sae_lightning.data.errors import DataError, tell
from sae_lightning.data.images import ImageData
from sae_lightning.data.labels import (
    UNLABELLED,
    class_name,
    positions,
    sorted_names,
    tell_blank,
    tell_unseen,
    without_withheld,
)
from sae_lightning.data.patterns import files_of, fixed_folder
from sae_lightning.data.scan import level
from sae_lightning.data.splits import SPLITS, USUAL, by_split, cut, train_share
from sae_lightning.data.tar_headers import CutShortError
from sae_lightning.data.tar_index import TarIndex, index_tars
from sae_lightning.data.tar_reader import ArrowTexts, TarPictures
from sae_lightning.data.tar_samples import Keys
from sae_lightning.data.texts import Texts


def load_webdataset(cfg: dict[str, Any], split: str) -> ImageData:
    """``split`` of the tar files that ``path`` and ``splits`` name; ids are ``<tar>/<key>``.

    Labels come from the member ``label_suffix`` (.cls) or the .json's ``label_key``, captions from .txt or its
    ``caption_key``; class names are ``classes`` (a list, or a text file with one a line) or the labels themselves.
    Splits without files of their own are cut from train. Tars whose end is missing are refused, or with
    ``unreadable`` skip read as far as they go. Raises DataError.
    """
    path = Path(cfg["path"]).expanduser()
    tars = split_tars(path, cfg["splits"])
    missing = [s for s in SPLITS[1:] if s not in tars]
    held_out = dict.fromkeys(missing, float(cfg["held_out"]))
    train_share(held_out)
    keys = Keys(cfg["label_key"], cfg["caption_key"], (cfg.get("label_suffix") or "cls").lower().strip("."))
    cut_short = cfg.get("unreadable") == "skip"
    indices = {s: _index(files, keys, cut_short) for s, files in tars.items()}
    own = split if split in indices else "train"
    index = indices[own]
    given = class_list(cfg.get("classes"))
    of_train = _different(indices["train"].table["label"])
    tell_blank(cfg["name"], of_train)
    texts = {s: without_withheld(i.table["label"].combine_chunks(), of_train) for s, i in indices.items()}
    names = given or sorted_names(set().union(*map(_different, texts.values()))) or [UNLABELLED]
    labels = label_positions(index, texts[own], names, given is not None, path)
    if names == [UNLABELLED] and given is None:
        others = _passed_over(index)
        tell(
            f"'{cfg['name']}' has no labels in {path}; "
            f"{f'passed over: {others}' if others else 'nothing lies beside the pictures'}. Name a member with "
            "data.label_suffix, or a key of .json with data.label_key."
        )
    elif own != "train":
        tell_unseen(cfg["name"], split, _different(texts[own]), of_train)
    images = _images(cfg["name"], split, index, labels, names, fixed_folder(path))
    if missing and split in ("train", *missing):
        return images.take(cut(images.labels, held_out, split, cfg["seed"]))
    return images


def _index(tars: Sequence[Path], keys: Keys, cut_short: bool) -> TarIndex:
    try:
        return index_tars(tars, keys, cut_short)
    except CutShortError as error:
        raise DataError(f"{error} Or read what is whole of such tars with extract.unreadable=skip.") from error


def split_tars(path: Path, patterns: Mapping[str, str | None]) -> dict[str, list[Path]]:
    """The tars of each split that has its own; train is always there.

    Patterns are relative to ``path``; null takes a folder of the split's name that lies in it, and says so where that
    name is less usual. What is left for train is ``path`` itself less the tars of the others.
    """
    tars = {}
    folders = by_split(level(path)[0]) if path.is_dir() else {}
    for split in SPLITS:
        pattern = patterns.get(split) or folders.get(split)
        if pattern is not None and pattern not in (patterns.get(split), *USUAL[split]):
            if not any((path / pattern).glob("*.tar")):
                continue
            tell(
                f"The folder '{pattern}' of {path} is taken for its {split} split; name another with "
                f"data.splits.{split}."
            )
        if pattern is not None:
            tars[split] = files_of(path / pattern)
    if "train" not in tars:
        others = {tar for files in tars.values() for tar in files}
        tars["train"] = [tar for tar in files_of(path) if tar not in others]
        if not tars["train"]:
            raise DataError(f"All tars in {path} belong to other splits; name those of train with data.splits.train.")
    twice = [tar for tar, count in Counter(tar for files in tars.values() for tar in files).items() if count > 1]
    if twice:
        raise DataError(f"{twice[0]} belongs to two splits; give data.splits patterns that do not overlap.")
    return tars


def class_list(classes: str | Sequence[str] | None) -> list[str] | None:
    """The configured class names, or None; DataError when they are none, or a file that cannot be read."""
    if classes is None:
        return None
    names: Sequence[str] = classes
    if isinstance(classes, str):
        try:
            names = Path(classes).expanduser().read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"data.classes={classes} cannot be read ({error}); it must be a text file with a class a line."
            ) from error
    names = [class_name(name).strip() for name in names if str(name).strip()]
    if not names:
        raise DataError(f"data.classes={classes} names no class.")
    return names


def _different(labels: pa.ChunkedArray | pa.Array) -> list[str]:
    return pc.unique(labels).drop_null().to_pylist()


def _passed_over(index: TarIndex) -> str:
    """What may hold the labels that are missing, each with the number of samples that have it."""
    most = sorted(index.passed_over.items(), key=lambda found: -found[1])[:10]
    return ", ".join(f"{name} in {count} samples" for name, count in most)


def label_positions(index: TarIndex, column: pa.Array, names: Sequence[str], given: bool, path: Path) -> np.ndarray:
    """The labels ``column`` [n] of the index as int64: the place of each among ``names``, or if these were ``given``
    the number that it is.

    DataError when some images have a label and others none, or one is neither a name nor a number in range.
    """
    if column.null_count == len(column) and list(names) == [UNLABELLED]:
        return np.zeros(len(column), dtype=np.int64)
    if column.null_count:
        bare = index.table["key"][pc.index(column.is_null(), True).as_py()]
        passed_over = _passed_over(index)
        raise DataError(
            f"{column.null_count} of {len(column)} samples in {path} have no label (first: '{bare}'); give all of "
            f"them a .cls, or a .json with data.label_key{f' (passed over: {passed_over})' if passed_over else ''}."
        )
    place = {name: i for i, name in enumerate(names)}
    different = pc.unique(column)
    where = [place.get(text, int(text) if given and text.isdecimal() else -1) for text in different.to_pylist()]
    strange = next((t for t, w in zip(different.to_pylist(), where, strict=True) if not 0 <= w < len(names)), None)
    if strange is not None:
        raise DataError(f"Label '{strange}' in {path} is none of the {len(names)} data.classes; correct data.classes.")
    return np.asarray(where, dtype=np.int64)[positions(column, different.to_pylist())]


def _images(name: str, split: str, index: TarIndex, labels: np.ndarray, names: Sequence[str], root: Path) -> ImageData:
    tar, keys = index.table["tar"].to_numpy(), index.table["key"].to_pylist()
    stems = [os.path.relpath(path, root).removesuffix(".tar") for path in index.tars]
    captions = index.table["caption"].combine_chunks()
    held = Contents(root, [os.path.relpath(path, root) for path in index.tars], index.marks)
    content = hashlib.sha256(b"".join(held.of(range(len(index.tars)))))
    content.update(index.table["offset"].to_numpy().tobytes())
    return ImageData(
        name, split, names, labels, [f"{stems[t]}/{key}" for t, key in zip(tar.tolist(), keys, strict=True)],
        TarPictures(index), content.digest(),
        Texts(ArrowTexts(captions), np.arange(len(captions))) if not captions.null_count else None,
    )  # fmt: skip
