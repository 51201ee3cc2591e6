"""Images in folders, one a class: any tree of your own, and ImageNet's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sae_lightning.data.images import SPLITS, DataError, ImageData, split_indices

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}


def scan(root: Path) -> tuple[list[Path], np.ndarray, list[str]]:
    """Image files below the class folders of ``root``, their labels [n] and the class names, sorted."""
    if not root.is_dir():
        raise DataError(f"There is no folder {root}; set data.path to a folder with one sub-folder a class.")
    classes = sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in SUFFIXES)
        files += found
        labels += [label] * len(found)
    if not files:
        raise DataError(f"No images lie in {root}; expected {root}/<class>/<picture>.jpg (or png, webp …).")
    return files, np.asarray(labels, dtype=np.int64), classes


def from_files(
    name: str, split: str, root: Path, files: list[Path], labels: np.ndarray, classes: list[str]
) -> ImageData:
    """ImageData over files; the fingerprint knows their sizes and times, not their bytes, so that it stays cheap."""

    def content(index: int) -> bytes:
        stat = files[index].stat()
        return f"{stat.st_size}:{stat.st_mtime_ns}".encode()

    ids = [p.relative_to(root).as_posix() for p in files]
    return ImageData(name, split, classes, labels, ids, lambda i: files[i], content)


def load_folder(cfg: dict[str, Any], split: str) -> ImageData:
    """``path/<class>/…`` divided by ``shares`` and ``seed``, or ``path/{train,val,test}/<class>/…`` as it is."""
    root = Path(cfg["path"])
    if all((root / s).is_dir() for s in SPLITS):
        files, labels, classes = scan(root / split)
        return from_files(cfg["name"], split, root, files, labels, classes)
    files, labels, classes = scan(root)
    index = split_indices(labels, dict(cfg["shares"]), cfg["seed"])[split]
    return from_files(cfg["name"], split, root, [files[i] for i in index], labels[index], classes)


def load_imagenet(cfg: dict[str, Any], split: str) -> ImageData:
    """ImageNet-1K as ``path/train/<wnid>/…`` and ``path/val/<wnid>/…``.

    The official val split is our test; our val is a stratified share of train, left out of train.
    """
    from timm.data import ImageNetInfo

    root = Path(cfg["path"])
    files, labels, wnids = scan(root / ("val" if split == "test" else "train"))
    if split != "test":
        index = split_indices(labels, {"train": 1 - cfg["val_share"], "val": cfg["val_share"]}, cfg["seed"])[split]
        files, labels = [files[i] for i in index], labels[index]
    info = ImageNetInfo()
    words = {wnid: info.label_name_to_description(wnid, detailed=False) for wnid in info.label_names()}
    return from_files("imagenet", split, root, files, labels, [words.get(w, w) for w in wnids])
