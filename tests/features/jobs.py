"""Extractions to break: pictures, configs, processes that can be killed, and what must be equal afterwards."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image

from sae_lightning.backbones import Tap
from sae_lightning.data import DataError, ImageData, load_images
from sae_lightning.features.ensure import extract_stores, plain
from sae_lightning.features.extract import Settings, Summary, extract
from sae_lightning.features.store import FeatureStore, StoreError
from sae_lightning.features.writer import StoreWriter
from tests.conftest import CONF

PATCH = Tap("patch", 4)

# Processes are forked off a server that has imported everything and computed nothing, so that one costs 50 ms.
os.environ.setdefault("OMP_NUM_THREADS", "1")
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__, "sae_lightning.training.run"])


class Job:
    """``work(*args)`` in a process of its own, in which ``before()`` ran first; what it prints goes to ``log``."""

    def __init__(self, log: Path, work: Callable, *args: Any, before: Callable[[], object] | None = None) -> None:
        self.log = log
        self.process = PROCESSES.Process(target=_run, args=(log, before, work, args))
        self.process.start()

    def kill(self, after: float = 0) -> bool:
        """SIGKILL after so many seconds; whether it was still at work."""
        self.process.join(after)
        self.process.kill()
        self.process.join()
        return self.process.exitcode == -signal.SIGKILL

    def end(self, timeout: float = 120) -> int:
        """Its exit status."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"still running: {self.said()}")
        return self.process.exitcode

    def said(self) -> str:
        return self.log.read_text()


def _run(log: Path, before: Callable[[], object] | None, work: Callable, args: tuple) -> None:
    """An error with a sentence is printed as such and exits 1; any other shows its traceback."""
    torch.set_num_threads(1)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    if before is not None:
        before()
    try:
        work(*args)
    except (DataError, StoreError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        sys.exit(1)


# --- real extractions -------------------------------------------------------------------------------------
def make_pictures(folder: Path, n: int, splits: tuple[str, ...] = ("train",)) -> Path:
    """``folder/<split>/<even or odd>/<i>.png``, noise of 32 x 32."""
    rng = np.random.default_rng(0)
    for i in range(n):
        for split in splits:
            target = folder / split / ("even", "odd")[i % 2] / f"{i}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)).save(target)
    return folder


def picture_config(pictures: Path, root: Path, *overrides: str, backbone: str = "mae") -> DictConfig:
    """A tiny backbone on ``pictures``, four a batch and a shard; stores and runs below ``root``."""
    return made(
        root, "data=folder", f"data.path={pictures}", f"backbone={backbone}", "backbone.size=tiny",
        "extract.batch_size=4", "extract.images_per_shard=4", *overrides,
    )  # fmt: skip


def made(root: Path, *overrides: str) -> DictConfig:
    """A composed config with stores and runs below ``root``."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [f"paths.stores={root / 'stores'}", f"paths.runs={root / 'runs'}", *overrides])


def extract_split(cfg: DictConfig, taps: list[Tap] | None = None, split: str = "train") -> dict[Tap, Path]:
    """What ``extract.py`` does for one split; the folders."""
    return extract_stores(cfg, load_images(plain(cfg.data), split), taps or [PATCH])


# --- extractions without an encoder -----------------------------------------------------------------------
PIXELS = Tap("patch", 0)


class Noise:
    """``read`` of ImageData: picture i, 4 x 4 of noise; broken for ``unreadable`` i."""

    def __init__(self, unreadable: tuple[int, ...] = ()) -> None:
        self.unreadable = unreadable

    def __call__(self, i: int) -> Image.Image | bytes:
        if i in self.unreadable:
            return b"no picture"
        return Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 4, 3)).astype(np.uint8))


def noise_images(n: int = 11, unreadable: tuple[int, ...] = ()) -> ImageData:
    """``n`` images named image-0 …, of three classes."""
    ids = [f"image-{i}" for i in range(n)]
    return ImageData("noise", "train", ["a", "b", "c"], [i % 3 for i in range(n)], ids, Noise(unreadable))


def as_pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float()


class PixelEncoder:
    """What ``extract`` needs of a Backbone; a picture's features are its pixels, [16, 3]. ``seen`` counts pictures."""

    title, image_size, transform = "pixels (test)", 4, staticmethod(as_pixels)

    def __init__(self) -> None:
        self.seen = 0

    def check(self, tap: Tap) -> Tap:
        return tap

    def to(self, device: object) -> None:
        pass

    def forward_features(self, images: torch.Tensor, taps: list[Tap]) -> dict[Tap, torch.Tensor]:
        self.seen += len(images)
        return dict.fromkeys(taps, images.flatten(2).transpose(1, 2))


def pixel_writer(folder: Path, per_shard: int = 4, **changes: Any) -> StoreWriter:
    """A writer for the features of ``PixelEncoder``."""
    about = {
        "data": "noise", "split": "train", "backbone": "pixels (test)", "kind": "patch", "layer": 0, "grid": (4, 4),
        "class_names": ["a", "b", "c"],
    } | changes  # fmt: skip
    return StoreWriter(folder, "f" * 64, about, per_shard)


def extract_pixels(
    folder: Path, images: ImageData | None = None, encoder: Any = None, per_shard: int = 4, **settings: Any
) -> Summary:
    """Make or complete the store ``folder`` of the pixels of ``images``."""
    chosen = Settings(**({"batch_size": 3, "device": "cpu"} | settings))
    return extract(images or noise_images(), encoder or PixelEncoder(), {PIXELS: pixel_writer(folder, per_shard)}, chosen)


# --- what must be equal, and what must be gone ------------------------------------------------------------
def content(folder: Path) -> dict[str, Any]:
    """Everything that a sealed store says, after every byte of it was verified."""
    store = FeatureStore.open(folder, verify=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    return {
        "manifest": manifest, "features": store.features(slice(None)).view(torch.int16).numpy().tobytes(),
        "ids": store.image_ids, "labels": store.labels.tolist(), "mean": store._statistics["mean"].tolist(),
        "deviation": store._statistics["deviation"].tolist(),
    }  # fmt: skip


def times(folder: Path) -> dict[str, int]:
    """When each shard of ``folder`` was written."""
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.glob("shard-*"))}


def finished(folder: Path) -> dict[str, int]:
    """When each shard that counts as finished was written."""
    return {name: t for name, t in times(folder).items() if (folder / "records" / f"{name[6:11]}.json").is_file()}


def litter(folder: Path) -> list[str]:
    """What lies in a sealed store and does not belong to it."""
    shards = len(json.loads((folder / "manifest.json").read_text())["shards"])
    known = {"manifest.json", "statistics.safetensors", "images.parquet", "records"}
    known |= {f"shard-{i:05d}.safetensors" for i in range(shards)} | {f"records/{i:05d}.json" for i in range(shards)}
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if str(path.relative_to(folder)) not in known)


def cut(path: Path, n: int = 10) -> None:
    """Take the last bytes off a file."""
    path.write_bytes(path.read_bytes()[:-n])


def flip(path: Path, at: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# --- dying ------------------------------------------------------------------------------------------------
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree"}


def die_at(folder: Path, n: int) -> None:
    """Let this process SIGKILL itself just before the ``n``-th time it changes a file of ``folder`` (from 1)."""
    left = [n]

    def hook(event: str, args: tuple) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in CHANGES) and str(args[0]).startswith(str(folder)):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
