"""Small data sets for the tests of image sources."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}
NO_SPLITS = {"train": None, "val": None, "test": None}


def pixels(seed: int, size: int = 8) -> np.ndarray:
    """Noise [size, size, 3] uint8."""
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3)).astype(np.uint8)


def png(seed: int, size: int = 8) -> bytes:
    """``pixels`` as a PNG, which keeps them exactly."""
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed, size)).save(buffer, "PNG")
    return buffer.getvalue()


def write_pictures(root: Path, *paths: str) -> Path:
    """A picture at each path below ``root``, its seed being its place."""
    for seed, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(png(seed))
    return root


def class_folders(root: Path, per_class: int = 10, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """``root/<class>/<i>.png``."""
    return write_pictures(root, *(f"{c}/{i}.png" for c in classes for i in range(per_class)))


def write_tar(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar with these members in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(root: Path, shards: int = 3, per_shard: int = 8) -> Path:
    """``root/shard-000.tar`` …, each sample with a picture, a .cls (0 or 1) and a .txt."""
    for s in range(shards):
        members: dict[str, bytes] = {}
        for i in range(per_shard):
            seed = s * per_shard + i
            members |= {
                f"{i:05d}.png": png(seed), f"{i:05d}.cls": b"%d" % (i % 2), f"{i:05d}.txt": f"picture {seed}".encode()
            }  # fmt: skip
        write_tar(root / f"shard-{s:03d}.tar", members)
    return root


def folder_cfg(path: Path, **changes) -> dict:
    """A config of ``data=folder`` whose order is the folders'."""
    return {"source": "folder", "name": "mine", "path": str(path), "shares": SHARES, "seed": 1} | changes


def hf_cfg(path: Path, **changes) -> dict:
    """A config of ``data=hf`` whose order is the data set's."""
    return {
        "source": "hf", "name": str(path), "id": str(path), "config": None, "revision": None, "streaming": False,
        "image_column": None, "label_column": None, "caption_column": None,
        "splits": {"train": "train", "val": None, "test": None}, "held_out": 0.2, "seed": 0, "limit": None,
    } | changes  # fmt: skip


def tar_cfg(path: Path, **changes) -> dict:
    """A config of ``data=webdataset``."""
    return {
        "source": "webdataset", "name": "tars", "path": str(path), "splits": NO_SPLITS, "held_out": 0.25,
        "classes": None, "label_key": "label", "caption_key": "caption", "seed": 0,
    } | changes  # fmt: skip
