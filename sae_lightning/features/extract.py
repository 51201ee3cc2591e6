"""Running a backbone over images into a feature store, once for all jobs that want it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from sae_lightning.backbones import Backbone, default_layer, identity, load_backbone
from sae_lightning.data import ImageData, load_images
from sae_lightning.features.manifest import MANIFEST
from sae_lightning.features.store import FeatureStore, StoreError
from sae_lightning.features.writer import StoreWriter

PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}
FORMAT = "patch+pooled:float16:1"  # what the features are, beside images and backbone


def fingerprint(cfg: DictConfig, images: ImageData) -> str:
    """Hex digest of images, backbone weights or id, layer and precision: equal features have equal fingerprints."""
    parts = (images.fingerprint, identity(cfg.backbone), default_layer(cfg.backbone), cfg.extract.precision, FORMAT)
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()


def store_folder(cfg: DictConfig, images: ImageData, digest: str) -> Path:
    """``<stores>/<data>/<backbone>-<size>-L<layer>/<split>-<fingerprint>``."""
    backbone = f"{cfg.backbone.name}-{cfg.backbone.size}-L{default_layer(cfg.backbone)}"
    return Path(cfg.paths.stores) / images.name.replace("/", "--") / backbone / f"{images.split}-{digest[:8]}"


def ensure_store(cfg: DictConfig, split: str) -> FeatureStore:
    """The store of ``split`` for ``cfg.data``, ``cfg.backbone`` and ``cfg.extract``; extracted now if it is missing.

    Jobs that want the same store at once wait for the one that extracts it. Raises DataError,
    BackboneError or StoreError with a sentence.
    """
    images = load_images(plain(cfg.data), split)
    digest = fingerprint(cfg, images)
    folder = store_folder(cfg, images, digest)
    if not (folder / MANIFEST).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with waiting_lock(folder):
            if not (folder / MANIFEST).is_file():
                backbone = load_backbone(plain(cfg.backbone))
                extract(images, backbone, folder, digest, **plain(cfg.extract))
    store = FeatureStore.open(folder)
    if store.fingerprint != digest:
        raise StoreError(
            f"{folder} has fingerprint {store.fingerprint[:12]}, expected {digest[:12]}: it was made from other "
            "images or another backbone. Delete it and extract again."
        )
    return store


def extract(
    images: ImageData,
    backbone: Backbone,
    folder: Path,
    digest: str,
    batch_size: int = 256,
    num_workers: int | None = None,
    images_per_shard: int = 4096,
    device: str = "auto",
    precision: str = "32",
) -> None:
    """Write the store ``folder`` of the backbone's default layer, going on from finished shards if there are some."""
    if str(precision) not in PRECISIONS:
        raise StoreError(f"Unknown extract.precision={precision}; choose one of {', '.join(PRECISIONS)}.")
    target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    about = {
        "data": images.name, "split": images.split, "backbone": backbone.title, "layer": backbone.layer,
        "grid": backbone.grid, "class_names": images.class_names,
    }  # fmt: skip
    writer = StoreWriter(folder, digest, about, images.image_ids, images.labels, images_per_shard)
    if num_workers is None:  # decoding small images costs less than starting workers
        num_workers = 0 if backbone.image_size <= 64 else max(1, (os.cpu_count() or 2) - 1)
    todo = _Transformed(images, backbone, writer.done)
    loader = DataLoader(todo, batch_size, num_workers=num_workers, pin_memory=target.type == "cuda")
    backbone = backbone.to(target)
    kind = PRECISIONS[str(precision)]
    title = f"Extracting {backbone.title} layer {backbone.layer}, {images.name} {images.split}"
    with tqdm(total=len(images), initial=writer.done, desc=title, unit="image", mininterval=0.5) as bar:
        for batch in loader:
            with torch.autocast(target.type, dtype=kind, enabled=kind != torch.float32):
                out = backbone.forward_features(batch.to(target, non_blocking=True))
            writer.append(out["patch"], out["pooled"])
            bar.update(len(batch))
    writer.seal()


class _Transformed(Dataset):
    """The images from ``start`` on, as the backbone's input."""

    def __init__(self, images: ImageData, backbone: Backbone, start: int) -> None:
        self.images, self.transform, self.start = images, backbone.transform, start

    def __len__(self) -> int:
        return len(self.images) - self.start

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.images[self.start + index])


@contextmanager
def waiting_lock(folder: Path) -> Iterator[None]:
    """A lock file beside ``folder``; says once that it waits for another job."""
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        lock.acquire(timeout=0.1)
    except Timeout:
        print(f"Another job is extracting {folder}; waiting for it.", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def plain(node: Any) -> dict[str, Any]:
    """A config node as a plain dict."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else dict(node)  # type: ignore[return-value]
