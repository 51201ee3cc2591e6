"""What several tests share: synthetic stores, and pictures with configs that train on them."""

from __future__ import annotations

import fcntl
import gc
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from PIL import Image

from sae_lightning.distributed.processes import preload
from sae_lightning.features.store import FeatureStore
from sae_lightning.features.writer import StoreWriter
from sae_lightning.runs.identity import run_name
from tests.configs import composed
from tests.processes import server_address, share_server

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
# one server for all tests and all of pytest's processes, which imports once what those forked off it need
preload("tests.data.test_images", "tests.features.jobs", "sae_lightning.training.packed", "datasets", "pandas", "timm")

gc.disable()  # until all tests are known, which takes a quarter less time without
os.fsync = lambda fd: None  # what tests write need not outlive a power cut; a training's sixteen calls take 0.15 s

N_PATCHES, D_IN, CLASSES = 16, 12, 3


def pytest_configure() -> None:
    """Start the server, or in one of several of pytest's processes share that of the first.

    With TESTS_FAST in the environment no process is started: the tests that want one are skipped.
    """
    if "TESTS_FAST" in os.environ:
        BaseProcess.start = lambda self: pytest.skip("starts a process")  # type: ignore[assignment]
        return
    if "TESTS_SERVER" in os.environ:
        share_server(os.environ["TESTS_SERVER"])
    else:
        forkserver.ensure_running()
        os.environ["TESTS_SERVER"] = server_address()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which instructions this run's products used, as figures differ in their last digits between processors."""
    known = torch.backends.cpu.get_cpu_capability()
    limits = [
        f"{name}={os.environ[name]}" for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY") if name in os.environ
    ]
    amx, bf16 = (getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("amx_tile", "avx512_bf16"))
    said = f"processor: {platform.machine()}, PyTorch uses {known}, AMX {amx}, bf16 {bf16} {' '.join(limits)}"
    terminalreporter.write_line(said.rstrip())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that of several processes none waits long for another's last file."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    gc.freeze()
    gc.enable()


def sparse_features(n_images: int, seed: int, d_in: int = D_IN, n_patches: int = N_PATCHES) -> torch.Tensor:
    """Patch tokens [n, P, d_in]: sums of 3 of 30 fixed directions, off centre, with some noise."""
    directions = torch.nn.functional.normalize(torch.randn(30, d_in, generator=torch.Generator().manual_seed(0)), dim=1)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(n_images * n_patches, 30, generator=generator)
    active = scores.topk(3, dim=1).indices
    weights = torch.zeros_like(scores).scatter(1, active, 0.5 + torch.rand(active.shape, generator=generator))
    noise = 0.02 * torch.randn(len(weights), d_in, generator=generator)
    return (weights @ directions + noise + torch.linspace(-2, 2, d_in)).reshape(n_images, n_patches, d_in)


def write_store(folder: Path, n_images: int, seed: int, images_per_shard: int = 50, **changes) -> FeatureStore:
    """A sealed store in ``folder`` with ``sparse_features``; ``changes`` replace entries of its description."""
    return fill_store(folder, sparse_features(n_images, seed), images_per_shard, f"{seed:064x}", **changes)


def fill_store(
    folder: Path, features: torch.Tensor, images_per_shard: int = 50, fingerprint: str = "f" * 64,
    dtype: str = "float16", batch: int = 33, **changes,
) -> FeatureStore:  # fmt: skip
    """A sealed store of ``features`` [n, P, d], image i of class i mod 3; ``changes`` replace its description.

    Where these name other classes, i mod their number.
    """
    about = {
        "data": "synthetic", "split": "train", "backbone": "none (synthetic)", "kind": "patch", "layer": 0,
        "grid": (4, 4), "class_names": [f"class {c}" for c in range(CLASSES)],
    } | changes  # fmt: skip
    writer = StoreWriter(folder, fingerprint, about, images_per_shard, dtype)
    shards = range(0, len(features), images_per_shard)
    for index, start in enumerate(shards):
        fill_shard(writer, index, features, start, batch, len(about["class_names"] or range(CLASSES)))
    writer.seal(len(shards))
    return FeatureStore.open(folder)


def fill_shard(
    writer: StoreWriter, index: int, features: torch.Tensor, start: int, batch: int = 33, classes: int = CLASSES
) -> None:
    """Write one shard of ``features``, whose first image is ``start``; image i is of class i mod ``classes``."""
    shard = writer.begin(index)
    images = range(start, min(len(features), start + writer.images_per_shard))
    ids = [f"image-{i}" for i in images]
    for at in range(0, len(images), batch):
        shard.append(features[images[at : at + batch]], ids[at : at + batch])
    writer.finish(index, shard, ids, [i % classes for i in images])


@pytest.fixture(scope="session")
def stores(tmp_path_factory) -> dict[str, FeatureStore]:
    """Synthetic stores: train (400 images), val (60) and test (90)."""
    root = tmp_path_factory.mktemp("stores")
    sizes = {"train": 400, "val": 60, "test": 90}
    return {
        split: write_store(root / split, size, seed, split=split)
        for seed, (split, size) in enumerate(sizes.items(), start=1)
    }


@pytest.fixture(scope="session")
def common(tmp_path_factory) -> Path:
    """A folder that all of pytest's processes share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "common"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time make what is to lie at ``path``."""
    with open(f"{path}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def pictures(common) -> Path:
    """``train``, ``val`` and ``test`` with two classes of noisy stripes, 32 + 8 + 8 pictures."""
    root = common / "pictures"
    with locked(root):
        if not root.is_dir():
            _draw(root)
    return root


def _draw(root: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in {"train": 32, "val": 8, "test": 8}.items():
        for label in ("rows", "columns"):
            (root / split / label).mkdir(parents=True)
            for i in range(count // 2):
                pixels = rng.integers(0, 256, (32, 32, 3))
                stripes = np.arange(32) // rng.integers(2, 6) % 2 * 120
                pixels = pixels // 2 + (stripes[:, None, None] if label == "rows" else stripes[None, :, None])
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / label / f"{i}.png")


@pytest.fixture
def config(pictures, tmp_path, tmp_path_factory):
    """``config(*overrides)``: a composed config on the pictures; stores are shared, runs are the test's own."""
    stores = tmp_path_factory.getbasetemp() / "training-stores"

    def make(*overrides: str) -> DictConfig:
        return composed(
            "config",
            "data=folder", f"data.path={pictures}", "backbone=deit", "backbone.size=tiny", "k=8", "expansion=2",
            "batch_size=256", "trainer.accelerator=cpu", "trainer.max_epochs=3", "dead_after=1000",
            "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=2",
            f"paths.stores={stores}", f"paths.runs={tmp_path / 'runs'}", *overrides,
        )  # fmt: skip

    return make


@pytest.fixture
def alone(config, common):
    """``alone(*overrides)``: the folder of that run, trained once for all tests, which leave it as it is."""
    from sae_lightning.training.fit import train

    def trained(*overrides: str) -> Path:
        root = common / f"alone-{torch.get_num_threads()}"  # on which the rounding of products may depend
        cfg = config(*overrides, f"paths.runs={root}")
        folder = root / run_name(cfg)
        with locked(root.with_name(f"{root.name}-{folder.name}")):
            return folder if (folder / "result.json").is_file() else train(cfg)

    return trained
