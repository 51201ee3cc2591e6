"""Extractions to break: pictures, configs, processes that can be killed, and what must be equal afterwards."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from functools import partial
from itertools import count
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image

from sae_lightning.backbones.backbone import Backbone, BackboneError, Tap
from sae_lightning.data import DataError, ImageData
from sae_lightning.features.extraction import Extraction, Summary, extract
from sae_lightning.features.manifest import StoreError
from sae_lightning.features.source import Source, extract_stores
from sae_lightning.features.store import FeatureStore
from sae_lightning.features.writer import StoreWriter
from tests.configs import composed
from tests.processes import HANG, PROCESSES, server_address, share_server, wait_for

PATCH = Tap("patch", 4)

# Processes are forked off a server that has imported everything and computed nothing, so that one costs 50 ms.
os.environ.setdefault("OMP_NUM_THREADS", "1")


class Job:
    """``work(*args)`` in a process of its own, in which ``before()`` ran first; what it prints goes to ``log``."""

    def __init__(self, log: Path, work: Callable, *args: Any, before: Callable[[], object] | None = None) -> None:
        self.log = log
        forkserver.ensure_running()
        self.process = PROCESSES.Process(target=_run, args=(log, before, work, args, server_address()))
        self.process.start()

    def kill(self, after: float = 0) -> bool:
        """SIGKILL after so many seconds; whether it was still at work."""
        self.process.join(after)
        self.process.kill()
        self.process.join()
        return self.process.exitcode == -signal.SIGKILL

    def end(self) -> int:
        """Its exit status; negative for a signal."""
        self.process.join(HANG)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"still running: {self.said()}")
        return self.process.exitcode

    def said(self) -> str:
        """What it has printed so far."""
        return self.log.read_text() if self.log.exists() else ""

    def sentence(self) -> str:
        """The error that it ended with, which is one sentence or two, not a traceback."""
        assert self.end() == 1, self.said()
        assert "Traceback" not in self.said(), self.said()
        return self.said().splitlines()[-1]


def _run(log: Path, before: Callable[[], object] | None, work: Callable, args: tuple, address: str) -> None:
    """An error with a sentence is printed as such and exits 1; any other shows its traceback."""
    share_server(address)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of workers, as in a job that a user starts
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    if before is not None:
        before()
    try:
        work(*args)
    except Exception as error:
        limit_files()
        with log.open("a") as file:
            known = isinstance(error, (DataError, StoreError, BackboneError))
            file.write(f"\n{type(error).__name__}: {error}\n" if known else traceback.format_exc())
        sys.exit(1)


# --- real extractions -------------------------------------------------------------------------------------
def make_pictures(folder: Path, n: int, others: int = 2) -> Path:
    """``folder/<split>/<even or odd>/<i>.png``, noise of 32 x 32: ``n`` to train on, ``others`` in val and in test."""
    rng = np.random.default_rng(0)
    for split, size in {"train": n, "val": others, "test": others}.items():
        for i in range(size):
            target = folder / split / ("even", "odd")[i % 2] / f"{i}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)).save(target)
    return folder


def picture_config(pictures: Path, root: Path, *overrides: str, backbone: str = "mae") -> DictConfig:
    """A tiny backbone on ``pictures``, four a batch and a shard; stores and runs below ``root``."""
    return made(
        root, "data=folder", f"data.path={pictures}", f"backbone={backbone}", "backbone.size=tiny",
        "extract.batch_size=4", "extract.images_per_shard=4", "extract.device=cpu", *overrides,
    )  # fmt: skip


def made(root: Path, *overrides: str) -> DictConfig:
    """A composed config with stores and runs below ``root``."""
    return composed("config", f"paths.stores={root / 'stores'}", f"paths.runs={root / 'runs'}", *overrides)


def extract_split(cfg: DictConfig, taps: list[Tap] | None = None, split: str = "train") -> dict[Tap, Path]:
    """What ``extract.py`` does for one split; the folders."""
    return extract_stores(Source.of(cfg), Source.of(cfg).images(split), taps or [PATCH])


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


def pixel_writer(folder: Path, per_shard: int = 4, dtype: str = "float16") -> StoreWriter:
    """A writer for the features of ``PixelEncoder``."""
    about = {
        "data": "noise", "split": "train", "backbone": "pixels (test)", "kind": "patch", "layer": 0, "grid": (4, 4),
        "class_names": ["a", "b", "c"],
    }  # fmt: skip
    return StoreWriter(folder, "f" * 64, about, per_shard, dtype)


def extract_pixels(
    folder: Path, images: ImageData | None = None, encoder: Any = None, per_shard: int = 4, **settings: Any
) -> Summary:
    """Make or complete the store ``folder`` of the pixels of ``images``."""
    chosen = Extraction(**({"batch_size": 3, "device": "cpu"} | settings))
    return extract(
        images or noise_images(), encoder or PixelEncoder(), {PIXELS: pixel_writer(folder, per_shard)}, chosen
    )


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
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if str(path.relative_to(folder)) not in known
    )


def cut(path: Path, n: int = 10) -> None:
    """Take the last bytes off a file."""
    path.write_bytes(path.read_bytes()[:-n])


def flip(path: Path, at: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# --- what happens to a process in the middle of its work ---------------------------------------------------
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree"}


class Changes:
    """Calls ``act()`` just before this process changes a file below ``folder`` for the ``n``-th time (from 1)."""

    def __init__(self) -> None:
        self.folder, self.left, self.act = "", 0, lambda: None
        sys.addaudithook(self._hook)

    def at(self, folder: Path, n: int, act: Callable[[], Any]) -> None:
        self.folder, self.left, self.act = str(folder), n, act

    def _hook(self, event: str, args: tuple) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if self.left and (writes or event in CHANGES) and any(str(arg).startswith(self.folder) for arg in args[:2]):
            self.left -= 1
            if self.left == 0:
                self.act()


def die() -> None:
    """As by kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(folder: Path, n: int) -> None:
    """Die before the ``n``-th change below ``folder``."""
    Changes().at(folder, n, die)


def limit_files(size: int = -1) -> None:
    """No file of this process may grow beyond ``size`` bytes (writing is then refused as on a full disk); -1: any."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size < 0 else size, hard))


def silence() -> None:
    """Show no progress, whose log would grow too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def obey_permissions() -> None:
    """Give up root's right to write where the permissions forbid it."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capset(header, none) == 0, os.strerror(ctypes.get_errno())


def count_encoded(path: Path, seconds: float = 0, stuck: int = 0, gate: Path | None = None) -> None:
    """Let every batch that is encoded take ``seconds`` more and leave its length in ``path``.

    At its first batch the encoder says so by ``<path>.ready`` and waits until there is a ``gate``. At the batch number
    ``stuck`` it hangs, and ``<path>.stuck`` says so.
    """
    inner, batches = Backbone.forward_features, count(1)

    def forward_features(self: Backbone, images: torch.Tensor, taps: list[Tap]) -> dict[Tap, torch.Tensor]:
        number = next(batches)
        if number == 1:
            path.with_suffix(".ready").touch()
            while gate is not None and not gate.exists():
                time.sleep(0.01)
        time.sleep(seconds)
        with path.open("a") as file:
            file.write(f"{len(images)}\n")
        if number == stuck:
            path.with_suffix(".stuck").touch()
            time.sleep(1000)
        return inner(self, images, taps)

    Backbone.forward_features = forward_features  # type: ignore[method-assign]


def kill_at_random(log: Path, counted: Path, rng: random.Random, work: Callable, *args: Any) -> bool:
    """Start an extraction and kill it after a few batches, at any moment of one; False when it was done before."""
    so_far = encoded(counted) + rng.randrange(4, 24)
    job = Job(log, work, *args, before=partial(count_encoded, counted, seconds=0.05))
    wait_for(lambda: encoded(counted) >= so_far or not job.process.is_alive())
    if job.kill(after=rng.uniform(0, 0.1)):
        return True
    assert job.end() == 0, job.said()
    return False


def encoded(path: Path) -> int:
    """Images that ``count_encoded`` counted."""
    return sum(map(int, path.read_text().split())) if path.exists() else 0


# --- trainings --------------------------------------------------------------------------------------------
class Diary(L.Callback):
    """Writes a line into ``path`` for every step that is done: number, epoch, and a sum over the batch's rows.

    Before the steps (from 0) of ``die`` the process, or that of ``rank``, is killed, once each.
    """

    looks_on = True  # a run is the same with it

    def __init__(self, path: str, die: tuple[int, ...] = (), rank: int = 0) -> None:
        self.path, self.die, self.rank = Path(path), die, rank
        self.rows = 0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        self.rows = sum(zlib.crc32(row.tobytes()) for row in batch.numpy())
        died = self.path.with_name(f"{self.path.name}-died-{trainer.global_step}")
        if trainer.global_step in self.die and trainer.global_rank == self.rank and not died.exists():
            died.touch()
            die()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        with self.path.open("a") as file:
            file.write(f"{trainer.global_step} {trainer.current_epoch} {trainer.world_size} {self.rows}\n")


def read_diary(path: Path) -> tuple[list[tuple[int, int]], dict[int, tuple[int, int]]]:
    """The steps in the order in which they were done, each with its ranks; and what stands of them in the end.

    That is, by step: its epoch and the sum over its global batch. A step that was done again counts the last time.
    """
    order: list[tuple[int, int]] = []
    final: dict[int, list[tuple[int, int]]] = {}
    for line in path.read_text().splitlines():
        step, epoch, ranks, rows = map(int, line.split())
        if (step, ranks) not in order[-3:] or len(final[step]) == ranks:
            order.append((step, ranks))
            final[step] = []
        final[step].append((epoch, rows))
    return order, {step: (parts[0][0], sum(rows for _, rows in parts)) for step, parts in final.items()}
