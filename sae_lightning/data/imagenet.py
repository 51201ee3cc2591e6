"""ImageNet-1K in its usual layout."""

from __future__ import annotations

import re
from typing import Any

from sae_lightning.data.errors import DataError
from sae_lightning.data.folder import from_scan, labels_of
from sae_lightning.data.images import ImageData
from sae_lightning.data.scan import existing_folder, level, scan
from sae_lightning.data.splits import cut

WNID = re.compile(r"n\d{8}")


def load_imagenet(cfg: dict[str, Any], split: str) -> ImageData:
    """ImageNet-1K as ``path/train/<wnid>/…`` and ``path/val/<wnid>/…``.

    The official val split is our test; our val is a stratified share of train, left out of train. Labels
    index the wnids of train in sorted order. Raises DataError when folders are missing or not named by wnid.
    """
    from timm.data import ImageNetInfo

    root = existing_folder(cfg["path"])
    wnids = wnid_folders(root, "train")
    folder = "val" if split == "test" else "train"
    unknown = sorted(set(wnid_folders(root, folder)) - set(wnids))
    if unknown:
        raise DataError(f"{root / folder} has a folder {unknown[0]} that {root / 'train'} lacks.")
    found = scan(root, folder)
    labels = labels_of(found, wnids, folder)
    info = ImageNetInfo()
    words = {wnid: info.label_name_to_description(wnid, detailed=False) for wnid in info.label_names()}
    images = from_scan("imagenet", split, found, labels, [words.get(w, w) for w in wnids])
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
