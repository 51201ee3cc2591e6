"""Pictures in folders as users have them: with or without folders a split, with or without folders a class."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sae_lightning.data.contents import Contents
from sae_lightning.data.errors import DataError, NotGivenError, tell
from sae_lightning.data.images import WNID, ImageData, Texts, data_source, in_words
from sae_lightning.data.splits import (
    SPLITS,
    UNLABELLED,
    by_split,
    choose_splits,
    class_name,
    cut,
    missing_splits,
    split_of_name,
    tell_unseen,
)

SUFFIXES = frozenset(("jpg", "jpeg", "jfif", "png", "bmp", "webp", "avif", "gif", "tif", "tiff", "ppm", "pgm"))

LITTER = frozenset(  # what systems and archivers leave in folders, as are hidden files
    ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs.db",
     "ehthumbs.db", "desktop.ini", "Desktop.ini", "Icon\r")
)  # fmt: skip


@dataclass(frozen=True)
class Scan:
    """Pictures below ``root``: ``paths`` relative to it with /, sorted; ``marks`` [n, 3] int64 as ``size_and_times``.

    ``texts`` are the relative paths of .txt files, without their suffix; ``left_out`` counts the other files by suffix.
    """

    root: str
    paths: list[str]
    marks: np.ndarray
    texts: frozenset[str]
    left_out: Counter[str]


def existing_folder(path: str | Path) -> Path:
    """``path`` with ~ expanded; DataError when it is no folder."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}; set data.path to the folder that holds the pictures.")
    return folder


def scan(root: Path, below: str = "") -> Scan:
    """The pictures in ``root/below`` at any depth; hidden files and litter are left out, links followed.

    About 300,000 pictures a second on a local disk. DataError when a picture is a link to nothing or a
    folder cannot be read.
    """
    paths: list[str] = []
    marks = array("q")
    texts = set()
    left_out: Counter[str] = Counter()
    for path, entry in walk(root, below):
        suffix = suffix_of(entry.name)
        if suffix in SUFFIXES:
            paths.append(path)
            marks.extend(size_and_times(entry))
        elif path.endswith(".txt"):
            texts.add(path.removesuffix(".txt"))
        else:
            left_out[suffix] += 1
    return Scan(str(root), paths, np.array(marks, dtype=np.int64).reshape(-1, 3), frozenset(texts), left_out)


def suffix_of(name: str) -> str:
    """What follows the last dot of a file's name, in small letters; nothing without one."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def by_suffix(counts: Mapping[str, int]) -> str:
    """Counts of files in words: ``12 .heic, 2 without a suffix``, the ten most frequent."""
    most = sorted(counts.items(), key=lambda found: (-found[1], found[0]))
    named = [f"{count} {f'.{suffix}' if suffix else 'without a suffix'}" for suffix, count in most[:10]]
    return ", ".join(named) + (" …" if len(most) > 10 else "")


def tell_left_out(root: str | Path, counts: Mapping[str, int]) -> None:
    """Say how many files of each suffix are no pictures for us."""
    counts = {suffix: count for suffix, count in counts.items() if count}
    if counts:
        tell(
            f"Of the files in {root}, {sum(counts.values())} are left out, as no pictures by their suffix: "
            f"{by_suffix(counts)}."
        )


def level(folder: Path) -> tuple[list[str], bool]:
    """Names of the sub-folders, sorted, without hidden ones and litter, and whether pictures lie in ``folder`` itself.

    Stops at the first picture, so that a flat folder of a million costs nothing. DataError for what cannot be read,
    such as a link that leads to itself.
    """
    names = []
    try:
        with os.scandir(folder) as found:
            for entry in found:
                if _passed(entry.name):
                    continue
                if entry.is_dir():
                    names.append(entry.name)
                elif suffix_of(entry.name) in SUFFIXES:
                    return [], True
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}); repair or remove it.") from error
    return sorted(names), False


def has_picture(folder: Path) -> bool:
    """Whether a picture lies in ``folder``, at any depth."""
    return any(suffix_of(entry.name) in SUFFIXES for _, entry in walk(folder))


def _passed(name: str) -> bool:
    return name.startswith(".") or name in LITTER


def size_and_times(file: os.DirEntry | Path) -> tuple[int, int, int]:
    """Bytes, and when the content and anything at all last changed, in ns; DataError for a link to nothing.

    The last of them cannot be set back, as the date of a file can.
    """
    try:
        stat = file.stat()
    except OSError as error:
        raise DataError(f"{os.fspath(file)} cannot be read ({error.strerror}); repair or remove it.") from error
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def walk(root: Path, below: str = "") -> Iterator[tuple[str, os.DirEntry]]:
    """(path relative to ``root``, entry) of every file in ``root/below`` in sorted order, but hidden ones and litter.

    DataError when a folder cannot be read or a name is not UTF-8.
    """
    prefix = f"{below}/" if below else ""
    try:
        yield from _walk(os.path.join(root, below), prefix, frozenset())
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}); repair or remove it.") from error


def _walk(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, os.DirEntry]]:
    here = os.stat(folder)
    if (here.st_dev, here.st_ino) in above:
        return  # a link to a folder that it lies in
    above |= {(here.st_dev, here.st_ino)}
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if _passed(entry.name):
            continue
        if not entry.name.isascii() and any("\ud800" <= c <= "\udfff" for c in entry.name):
            raise DataError(f"The name of {entry.path!r} is not UTF-8; rename it.")
        if entry.is_dir():
            yield from _walk(entry.path, f"{prefix}{entry.name}/", above)
        else:
            yield prefix + entry.name, entry


@data_source("folder")
def load_folder(cfg: dict[str, Any], split: str) -> ImageData:
    """``path/<split>/<class>/…``, ``path/<class>/…``, ``path/<split>/…`` or just ``path/…``.

    ``folders`` maps splits to folders that have other names than the usual ones (null: by name), at any depth. Splits
    that have no folder are cut from train by ``shares`` and ``seed``. Without class folders all images are of one
    class, "unlabelled". Texts beside all pictures, of the same stem, are their captions. Raises DataError when there
    is no picture, or when pictures lie beside class folders.
    """
    if cfg["path"] is None:
        raise NotGivenError("data.path is missing; set it to the folder that holds the pictures.")
    root = existing_folder(cfg["path"])
    held_out = held_out_shares(cfg["shares"])
    named = named_folders(root, cfg.get("folders"))
    present = [*named.values()] if named else split_folders(root)
    if not present:
        names, split_of = sorted(set(class_names(root))), dict.fromkeys(SPLITS, "")
    else:
        split_of = choose_splits(named, present, str(root), "data.folders")
        of_folder = {folder: class_names(root / folder) for folder in split_of.values()}
        names = sorted(set().union(*of_folder.values()))
        own, of_train = of_folder[split_of[split]], of_folder[split_of["train"]]
        if own != [UNLABELLED] and of_train != [UNLABELLED]:
            tell_unseen(str(root), split, own, of_train)
    found = scan(root, split_of[split])
    labels = labels_of(found, names, split_of[split])
    images = from_scan(cfg["name"], split, found, labels, names)
    missing = missing_splits(split_of)
    if missing and split in ("train", *missing):
        return images.take(cut(labels, {s: held_out[s] for s in missing}, split, cfg["seed"]))
    return images


def named_folders(root: Path, folders: Mapping[str, str | None] | None) -> dict[str, str]:
    """The splits that ``folders`` names, with their folders; DataError unless these exist and train is among them."""
    named = {split: name for split, name in (folders or {}).items() if name is not None}
    missing = next((name for name in named.values() if not (root / name).is_dir()), None)
    if missing is not None:
        raise DataError(f"There is no folder {root / missing}; change data.folders, or data.path.")
    if named and ("train" not in named or not set(named) <= set(SPLITS)):
        raise DataError(f"data.folders={named} must name the folder of train, and may name those of val and test.")
    return named


def held_out_shares(shares: Mapping[str, float]) -> dict[str, float]:
    """The shares of val and test; DataError unless train, val and test have shares that add up to 1."""
    if set(shares) != set(SPLITS) or abs(sum(shares.values()) - 1) > 1e-6:
        raise DataError(f"data.shares={dict(shares)} must give train, val and test shares that add up to 1.")
    return {split: shares[split] for split in SPLITS[1:]}


def split_folders(root: Path) -> list[str]:
    """The sub-folders of ``root`` that are splits: there are some if one is train and val or test lies beside it,
    or nothing else. A train among other folders is a class, as in CIFAR-100."""
    folders, _ = level(root)
    present = [name for name in folders if split_of_name(name)]
    splits = by_split(folders)
    kinds = {*splits, *map(split_of_name, present)}
    if "train" in splits and (len(kinds) > 1 or len(folders) == 1):
        others = [name for name in folders if name not in splits.values() and has_picture(root / name)]
        if others:
            tell(f"{root} has folders of splits, so its pictures in {', '.join(others[:10])} are passed over.")
        return [*splits.values()]
    if folders and len(present) == len(folders) and "train" not in kinds:
        raise DataError(
            f"{root} has {' and '.join(present)} but no train; add it, or point data.path into one of them."
        )
    return []


def class_names(folder: Path) -> list[str]:
    """The sub-folders of ``folder`` that hold pictures, or "unlabelled" when these lie in it without any."""
    names, flat = level(folder)
    return [UNLABELLED] if flat else [class_name(name) for name in names if has_picture(folder / name)]


def labels_of(found: Scan, names: Sequence[str], below: str) -> np.ndarray:
    """Labels [n] int64 of the pictures: the place in ``names`` of their first folder under ``root/below``.

    DataError when there is no picture, or when some lie in folders and some do not.
    """
    where = os.path.join(found.root, below)
    if not found.paths:
        others = f" (there are {by_suffix(found.left_out)})" if found.left_out else ""
        raise DataError(
            f"No images lie in {where}{others}; expected <class>/<picture>.jpg (or png, webp …), or pictures alone."
        )
    start = len(below) + 1 if below else 0
    folders = [path[start:].partition("/")[::2] for path in found.paths]
    deep = [bool(rest) for _, rest in folders]
    if any(deep) and not all(deep):
        raise DataError(
            f"Pictures lie in {where} itself ({found.paths[deep.index(False)]}) and in folders below it "
            f"({found.paths[deep.index(True)]}); put all of them into class folders, or all side by side."
        )
    position = {name: i for i, name in enumerate(names)}
    place = {folder: position[class_name(folder)] for folder in dict(folders)} if deep[0] else {}
    return np.array([place[folder] if rest else position[UNLABELLED] for folder, rest in folders], dtype=np.int64)


def _file(root: str, paths: Sequence[str], row: int) -> Path:
    """The full path of picture ``row``."""
    return Path(root, paths[row])


def _text_beside(root: str, paths: Sequence[str], row: int) -> str:
    """The text beside picture ``row``, of the same stem with the suffix .txt; DataError when it has gone."""
    path = Path(root, paths[row].rpartition(".")[0] + ".txt")
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The caption {path} cannot be read ({error}); it must be a UTF-8 text file.") from error


def from_scan(name: str, split: str, found: Scan, labels: np.ndarray, names: Sequence[str]) -> ImageData:
    """ImageData over the scanned files, with their texts as captions where each has one."""
    captions = None
    if found.texts and found.texts.issuperset(path.rpartition(".")[0] for path in found.paths):
        captions = Texts(partial(_text_beside, found.root, found.paths), len(found.paths))
    tell_left_out(found.root, found.left_out | {"txt": 0 if captions else len(found.texts)})
    return ImageData(
        name, split, names, labels, found.paths, partial(_file, found.root, found.paths),
        Contents(found.root, found.paths, found.marks), captions,
    )  # fmt: skip


@data_source("imagenet")
def load_imagenet(cfg: dict[str, Any], split: str) -> ImageData:
    """ImageNet-1K as ``path/train/<wnid>/…`` and ``path/val/<wnid>/…``.

    The official val split is our test; our val is a stratified share of train, left out of train. Labels
    index the wnids of train in sorted order. Raises DataError when folders are missing or not named by wnid.
    """
    root = existing_folder(cfg["path"])
    wnids = wnid_folders(root, "train")
    folder = "val" if split == "test" else "train"
    unknown = sorted(set(wnid_folders(root, folder)) - set(wnids))
    if unknown:
        raise DataError(f"{root / folder} has a folder {unknown[0]} that {root / 'train'} lacks.")
    found = scan(root, folder)
    labels = labels_of(found, wnids, folder)
    images = from_scan("imagenet", split, found, labels, in_words(wnids, synonyms=True))
    if split == "test":
        return images
    return images.take(cut(labels, {"val": cfg["val_share"]}, split, cfg["seed"]))


def wnid_folders(root, folder: str) -> list[str]:
    """The wnids in ``root/folder``, sorted; DataError when it is missing or holds something else."""
    path = existing_folder(root / folder)
    names, flat = level(path)
    if flat:
        raise DataError(
            f"Pictures lie in {path} without class folders; sort them into <wnid>/, or use data=folder, which "
            "takes them as they are."
        )
    other = next((name for name in names if not WNID.fullmatch(name)), None)
    if other is not None:
        raise DataError(
            f"{path / other} is not named by a wnid such as n01440764; use data=folder for your own classes."
        )
    return names
