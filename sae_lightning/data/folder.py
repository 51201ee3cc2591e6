"""Pictures in folders as users have them: with or without folders a split, with or without folders a class."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sae_lightning.data.contents import Contents
from sae_lightning.data.errors import DataError, tell
from sae_lightning.data.images import ImageData
from sae_lightning.data.labels import UNLABELLED, class_name, tell_unseen
from sae_lightning.data.scan import Scan, by_suffix, existing_folder, has_picture, level, scan, tell_left_out
from sae_lightning.data.splits import SPLITS, by_split, choose_splits, cut, missing_splits, split_of_name
from sae_lightning.data.texts import TextFiles, Texts


def load_folder(cfg: dict[str, Any], split: str) -> ImageData:
    """``path/<split>/<class>/…``, ``path/<class>/…``, ``path/<split>/…`` or just ``path/…``.

    ``folders`` maps splits to folders that have other names than the usual ones (null: by name), at any depth. Splits
    that have no folder are cut from train by ``shares`` and ``seed``. Without class folders all images are of one
    class, "unlabelled". Texts beside all pictures, of the same stem, are their captions. Raises DataError when there
    is no picture, or when pictures lie beside class folders.
    """
    if cfg["path"] is None:
        raise DataError("data.path is missing; set it to the folder that holds the pictures.")
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


def from_scan(name: str, split: str, found: Scan, labels: np.ndarray, names: Sequence[str]) -> ImageData:
    """ImageData over the scanned files, with their texts as captions where each has one."""
    captions = None
    if found.texts and found.texts.issuperset(path.rpartition(".")[0] for path in found.paths):
        captions = Texts(TextFiles(found.root, found.paths), np.arange(len(found.paths)))
    tell_left_out(found.root, found.left_out | {"txt": 0 if captions else len(found.texts)})
    return ImageData(
        name, split, names, labels, found.paths, Files(found.root, found.paths),
        Contents(found.root, found.paths, found.marks), captions,
    )  # fmt: skip


class Files:
    """The full path of picture i."""

    def __init__(self, root: str, paths: Sequence[str]) -> None:
        self.root, self.paths = root, paths

    def __call__(self, row: int) -> Path:
        return Path(self.root, self.paths[row])
