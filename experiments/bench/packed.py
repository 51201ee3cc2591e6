"""Twelve SAEs of one backbone side by side from one stream, against the same twelve trainings in turn.

    python -m experiments.bench.packed [--quick] [--json FILE] [--cases tiny vit-b slow-disk] [--memory]

Expansion 8, 16, 32 by four sparsities, as in ViSAEBench's grid, on random features. ``tiny``: the demo's width of 128
and batches of 1024, where much of a step is overhead. ``vit-b``: width 768, where the encoder's product is most of a
step. ``slow-disk``: small dictionaries on features that arrive at ``--disk`` MB/s, as from a shared file system. Both
contenders are the commands' own functions, from config to written SAEs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.progress import Progress

from experiments.bench.timing import Row, interleaved, measure_peak, peak_mb, print_table, shared_parser, write_json
from sae_lightning.features.store import FeatureStore
from sae_lightning.features.writer import StoreWriter
from sae_lightning.training.fit import train
from sae_lightning.training.packed import train_packed

CONF = Path(__file__).resolve().parents[2] / "conf"
DIRECTIONS = 512


@dataclass(frozen=True)
class Case:
    """Features ``d_in`` wide, of ``patches`` an image; the grid of ``d_sae`` by ``ks``; ``steps`` of ``batch`` tokens.

    ``disk``: whether reading is slowed.
    """

    d_in: int
    patches: int
    d_sae: tuple[int, ...]
    ks: tuple[int, ...]
    batch: int
    steps: int
    disk: bool = False

    @property
    def images(self) -> int:
        """Images that fill the steps once."""
        return -(-self.batch * self.steps // self.patches)


CASES = {
    "tiny": Case(128, 64, (1024, 2048, 4096), (8, 16, 24, 32), 1024, 200),
    "vit-b": Case(768, 196, (6144, 12288, 24576), (64, 128, 192, 256), 2048, 6),
    "slow-disk": Case(768, 196, (384, 768, 1536), (8, 16, 24, 32), 2048, 60, disk=True),
}
QUICK = {
    "tiny": Case(128, 64, (512, 1024), (8, 16), 1024, 30),
    "slow-disk": Case(768, 196, (384, 768), (8, 16), 1024, 20, disk=True),
}


def write_store(folder: Path, case: Case, images: int, seed: int) -> None:
    """A sealed store of sums of 16 of ``DIRECTIONS`` directions with noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(DIRECTIONS, case.d_in, generator=generator), dim=1)
    generator.manual_seed(seed)
    side = round(case.patches**0.5)
    about = {"data": "random", "split": folder.name, "backbone": "dinov2 (random)", "kind": "patch", "layer": 11,
             "grid": (side, case.patches // side), "class_names": ["none"]}  # fmt: skip
    size = 64
    writer = StoreWriter(folder, f"{seed:064x}", about, size, "float16")
    shards = range(0, images, size)
    for index, start in enumerate(shards):
        count = min(size, images - start)
        shard = writer.begin(index)
        active = torch.randint(DIRECTIONS, (count * case.patches, 16), generator=generator)
        weights = torch.rand(active.shape, generator=generator).add_(0.5)
        x = torch.nn.functional.embedding_bag(active, directions, per_sample_weights=weights, mode="sum")
        x += 0.05 * torch.randn(x.shape, generator=generator)
        names = [f"{start + i}" for i in range(count)]
        shard.append(x.reshape(count, case.patches, case.d_in), names)
        writer.finish(index, shard, names, [0] * count)
    writer.seal(len(shards))


def configs(case: Case, stores: Path, runs: Path) -> list[DictConfig]:
    """The grid's configs; one epoch, no validation but the closing one."""
    common = [
        "data=store", f"data.train={stores / 'train'}", f"data.val={stores / 'val'}", f"data.test={stores / 'val'}",
        f"paths.runs={runs}",
        "backbone=dinov2", f"batch_size={case.batch}", f"trainer.max_steps={case.steps}", "trainer.max_epochs=-1",
        "trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "stream.buffer_mb=128",
        "trainer.log_every_n_steps=50",
    ]  # fmt: skip
    with initialize_config_dir(str(CONF), version_base="1.3"):
        grid = product(case.d_sae, case.ks)
        return [compose("config", [*common, f"d_sae={d_sae}", f"k={k}"]) for d_sae, k in grid]


@contextmanager
def slowed(megabytes_a_second: float | None) -> Iterator[None]:
    """Let all reading of stores together go at most so fast; None: as it comes."""
    if megabytes_a_second is None:
        yield
        return
    whole, lock, free = FeatureStore.read, Lock(), [0.0]

    def read(self: FeatureStore, start: int, rows: int, *rest: Any) -> None:
        tokens = rest[2] if len(rest) > 2 else 1
        seconds = rows * tokens * self.d_in * 2 / (megabytes_a_second * 1e6)
        with lock:
            free[0] = max(free[0], time.monotonic()) + seconds
            until = free[0]
        whole(self, start, rows, *rest)
        time.sleep(max(0.0, until - time.monotonic()))

    FeatureStore.read = read  # type: ignore[method-assign]
    try:
        yield
    finally:
        FeatureStore.read = whole  # type: ignore[method-assign]


def packed(cfgs: list[DictConfig]) -> list[Path]:
    """Side by side."""
    return train_packed(cfgs)


def in_turn(cfgs: list[DictConfig]) -> list[Path]:
    """One after another, each with all threads."""
    return [train(cfg) for cfg in cfgs]


CONTENDERS: dict[str, Callable[[list[DictConfig]], list[Path]]] = {"ours": packed, "in turn": in_turn}


def contender(name: str, case: Case, stores: Path, disk: float) -> Callable[[], None]:
    """A call that trains the grid into a fresh folder and removes it."""

    def run() -> None:
        runs = Path(tempfile.mkdtemp(dir=stores))
        try:
            with slowed(disk if case.disk else None):
                CONTENDERS[name](configs(case, stores, runs))
        finally:
            shutil.rmtree(runs)

    return run


def time_case(name: str, case: Case, args: argparse.Namespace) -> list[Row]:
    """Rows of one case."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        stores = Path(folder)
        write_store(stores / "train", case, case.images, 1)
        write_store(stores / "val", case, 8, 2)
        calls = {which: contender(which, case, stores, args.disk) for which in CONTENDERS}
        seconds = interleaved(calls, args.repeats, args.warmup)
        rows = []
        for which, taken in seconds.items():
            memory = None
            if args.memory:
                what = json.dumps([name, args.quick, which, str(stores), args.disk, args.threads])
                memory = peak_mb([sys.executable, "-m", "experiments.bench.packed", "--measure", what])
            rows.append(Row.of(f"{name}, {len(case.d_sae) * len(case.ks)} SAEs", which, taken, memory))
        return rows


def measure(what: str) -> None:
    """In a child process: print the peak memory of one contender."""
    name, quick, which, stores, disk, threads = json.loads(what)
    torch.set_num_threads(threads)
    case = (QUICK if quick else CASES)[name]
    print(json.dumps({"peak_mb": measure_peak(contender(which, case, Path(stores), disk), "cpu")}))


def main() -> None:
    parser = shared_parser(__doc__, "four small SAEs, a few steps")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="default: all")
    parser.add_argument("--disk", type=float, default=20, help="MB/s of the slow disk; default 20")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--folder", help="where the random features go; default: the temporary folder")
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
        return
    torch.set_num_threads(args.threads)
    cases = QUICK if args.quick else CASES
    if args.quick:
        args.repeats, args.warmup = 2, 0
    rows: list[Row] = []
    with Progress(transient=True) as progress:
        for name in progress.track([n for n in cases if n in (args.cases or cases)], description="Timing"):
            rows += time_case(name, cases[name], args)
            if args.json:
                write_json(args.json, rows)
    print_table(rows)


if __name__ == "__main__":
    importlib.import_module("experiments.bench.packed").main()
