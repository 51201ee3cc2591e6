"""Pictures in tar shards, as WebDataset packs them, with random access."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sae_lightning.data.contents import Contents
from sae_lightning.data.errors import DataError, tell
from sae_lightning.data.folder import level
from sae_lightning.data.images import ImageData, Texts, data_source
from sae_lightning.data.splits import (
    SPLITS,
    UNLABELLED,
    USUAL,
    by_split,
    class_name,
    cut,
    positions,
    sorted_names,
    tell_blank,
    tell_unseen,
    train_share,
    without_withheld,
)
from sae_lightning.data.tar_index import CutShortError, Keys, TarIndex, index_tars

RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")

WILD = re.compile(r"[*?\[{]")


def expand_braces(pattern: str) -> list[str]:
    """``x-{000..010}.tar`` or ``{a,b}/x`` written out, as bash does: padded with zeros, nested, in order.

    Braces with neither a comma nor a range of whole numbers stay as they are.
    """
    for start, end in _pairs(pattern):
        choices = _choices(pattern[start + 1 : end])
        if choices is not None:
            tails = expand_braces(pattern[end + 1 :])
            return [pattern[:start] + choice + tail for choice in choices for tail in tails]
    return [pattern]


def _pairs(pattern: str) -> Iterator[tuple[int, int]]:
    """Each opening brace with its closing one, from the left."""
    for start in (i for i, c in enumerate(pattern) if c == "{"):
        depth = 0
        for end in range(start, len(pattern)):
            depth += {"{": 1, "}": -1}.get(pattern[end], 0)
            if depth == 0:
                yield start, end
                break


def _choices(inside: str) -> list[str] | None:
    numbers = RANGE.fullmatch(inside)
    if numbers:
        first, last, step = int(numbers[1]), int(numbers[2]), abs(int(numbers[3] or 1)) or 1
        padded = any(re.match(r"-?0\d", text) for text in (numbers[1], numbers[2]))
        width = max(len(numbers[1]), len(numbers[2])) if padded else 0
        values = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
        return [f"{value:0{width}d}" for value in values]
    parts, depth = [""], 0
    for c in inside:
        depth += {"{": 1, "}": -1}.get(c, 0)
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [text for part in parts for text in expand_braces(part)] if len(parts) > 1 else None


def files_of(pattern: Path) -> list[Path]:
    """The tar files of a pattern: a folder's ``*.tar``, wildcards (sorted), braces (in their order), or the file.

    DataError when there is none, or when one that braces spell out is missing.
    """
    if pattern.is_dir():
        found = sorted(p for p in pattern.glob("*.tar") if not p.name.startswith("."))
        if not found:
            raise DataError(f"No *.tar files lie in {pattern}; set data.path (and data.splits) to where they are.")
        return found
    if pattern.is_file():
        return [pattern]
    files: list[Path] = []
    missing = []
    for text in expand_braces(str(pattern)):
        matches = sorted(glob.glob(text)) or [text]
        files += [Path(match) for match in matches]
        missing += [match for match in matches if not Path(match).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"There is no file {missing[0]}{more}; check the pattern {pattern}.")
    return list(dict.fromkeys(files))


def fixed_folder(pattern: Path) -> Path:
    """The folder that is named before the first wildcard or brace: what ids are relative to."""
    if pattern.is_dir():
        return pattern
    parts = pattern.parts
    wild = next((i for i, part in enumerate(parts) if WILD.search(part)), len(parts) - 1)
    return Path(*parts[: min(wild, len(parts) - 1)])


class TarPictures:
    """The encoded bytes of picture i; DataError when its tar has gone or become shorter."""

    def __init__(self, index: TarIndex) -> None:
        self.tars = [(str(path), time) for path, time in zip(index.tars, index.marks[:, 1].tolist(), strict=True)]
        self.tar = index.table["tar"].to_numpy()
        self.offset, self.size = index.table["offset"].to_numpy(), index.table["size"].to_numpy()

    def __call__(self, row: int) -> bytes:
        path, time = self.tars[self.tar[row]]
        size = int(self.size[row])
        try:
            file = _open(path, time)
            data = os.pread(file.descriptor, size, int(self.offset[row]))
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); it was there when it was indexed.") from error
        if len(data) != size:
            raise DataError(f"{path} has become shorter since it was indexed; copy it again.")
        return data


def _text(texts: pa.StringArray, row: int) -> str:
    """Text ``row`` of an Arrow array."""
    return texts[row].as_py()


class _File:
    """A descriptor that is closed when nobody holds it any more, so that a thread may go on reading an evicted one."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@lru_cache(maxsize=128)
def _open(path: str, time: int) -> _File:
    """One open file a tar and process; ``time`` opens it anew when it has been replaced."""
    return _File(path)


@data_source("webdataset")
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
        Texts(partial(_text, captions), len(captions)) if not captions.null_count else None,
    )  # fmt: skip
