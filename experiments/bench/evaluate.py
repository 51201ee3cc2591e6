"""Scoring an SAE: the one streaming pass of ``evaluate.py`` against the same metrics computed densely.

    python -m experiments.bench.evaluate [--quick] [--json FILE] [--images N] [--dense-images N] [--d-sae 6144 …]

Timed are M1, M2, M5 and the pooling for M3, M4 and M7, from a store of float16 features [N, 196, 768] on disk, with a
BatchTopK SAE of 64 active latents a token. ``ours`` computes MonoScore, purity, R² and cosine as well. ``dense`` is
``dense_evaluation``: each metric encodes all images for itself, as metrics written one by one do; ``dense, one pass``
shares the codes, which tells what sharing saves from what sparse codes save. Both are in float32 and give our figures;
with ``bf16`` they are faster and give them roughly, since the SAE's threshold is rounded. They are timed on
--dense-images, ours also on all --images and on twice as many.

``second SAE``: two SAEs that share one stream, against one. ``probes``: scikit-learn's part of M3, M4 and M7, from what
the pass has pooled. Peak memory (--memory) is that of a fresh process. Where others use the processor too, set
GOMP_SPINCOUNT=10000, lest threads that wait for each other keep it from those that work.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import norm
from torch import Tensor

from experiments.bench.dense_evaluation import Found
from experiments.bench.dense_evaluation import evaluate as dense
from experiments.bench.timing import Row, interleaved, measure_peak, peak_mb, print_table, shared_parser, write_json
from sae_lightning.evaluation.core import core_metrics
from sae_lightning.evaluation.scoring_pass import ScoringPass, stream
from sae_lightning.evaluation.similarity import ImageEmbeddings
from sae_lightning.features.store import FeatureStore
from sae_lightning.features.writer import StoreWriter
from sae_lightning.metrics import MonoScore, Moran
from sae_lightning.metrics import monosemanticity as m5
from sae_lightning.metrics.absorption import absorption
from sae_lightning.metrics.preservation import fit_raw, preservation
from sae_lightning.metrics.sparse_probing import sparse_probing
from sae_lightning.saes import SAE, BatchTopK, Normalizer

D, K, GRID, CLASSES, TOP = 768, 64, (14, 14), 100, 16
DIRECTIONS, THINGS, OWN = 4096, 48, 24  # in the world, on an image, and those that a class prefers
MORAN = {"min_active": 5, "min_variance": 1e-8, "min_images": 5}
TOLERANCE = {"": 2e-3, "bf16": 0.1}  # relative, of a contender whose name ends so


# --- images that were never taken ----------------------------------------------------------------------------
def directions() -> Tensor:
    """What there is to see: unit directions [DIRECTIONS, D]."""
    return torch.nn.functional.normalize(torch.randn(DIRECTIONS, D, generator=torch.Generator().manual_seed(0)), dim=1)


def features(first: int, count: int, world: Tensor) -> Tensor:
    """Features [count, P, D] float16 of images from number ``first`` on, number i of class i mod CLASSES.

    THINGS blobs of one direction each, half of them its class's, of 1 to 3.5 patches' radius, noise, and a mean.
    """
    draw = torch.Generator().manual_seed(1 + first)
    preferred = torch.randint(len(world), (CLASSES, OWN), generator=torch.Generator().manual_seed(0))
    own = preferred[(first + torch.arange(count)) % CLASSES].gather(
        1, torch.randint(OWN, (count, THINGS // 2), generator=draw)
    )
    seen = torch.cat([own, torch.randint(len(world), (count, THINGS - THINGS // 2), generator=draw)], dim=1)
    rows, columns = (torch.arange(n) + 0.5 for n in GRID)
    y, x, strength, radius = torch.rand(4, count, 1, THINGS, generator=draw)
    radius, strength = 1 + 2.5 * radius, 0.5 + strength
    down = torch.exp(-((rows[:, None] - GRID[0] * y) ** 2) / (2 * radius**2))
    across = torch.exp(-((columns[:, None] - GRID[1] * x) ** 2) / (2 * radius**2))
    maps = strength * (down[:, :, None] * across[:, None]).flatten(1, 2)
    noise = 0.03 * torch.randn(count, GRID[0] * GRID[1], D, generator=draw)
    return (maps @ world[seen] + noise + torch.linspace(-1, 1, D)).half()


def write_store(folder: Path, images: int, per_shard: int = 256) -> FeatureStore:
    """A sealed store of ``images`` of them."""
    about = {
        "data": "synthetic", "split": "test", "backbone": "none (synthetic)", "kind": "patch", "layer": 0, "grid": GRID,
        "class_names": [f"class {c}" for c in range(CLASSES)],
    }  # fmt: skip
    writer, world = StoreWriter(folder, "0" * 64, about, per_shard), directions()
    starts = range(0, images, per_shard)
    for index, start in enumerate(starts):
        shard, stop = writer.begin(index), min(images, start + per_shard)
        ids = [f"image-{i}" for i in range(start, stop)]
        for at in range(start, stop, 32):
            n = min(32, stop - at)
            shard.append(features(at, n, world), ids[at - start : at - start + n])
        writer.finish(index, shard, ids, [i % CLASSES for i in range(start, stop)])
    writer.seal(len(starts))
    return FeatureStore.open(folder)


@torch.no_grad()
def save_sae(folder: Path, store: FeatureStore, d_sae: int, images: int = 64) -> None:
    """An SAE that knows the world's directions, and random ones beside; K latents a token on the first images."""
    sae = BatchTopK(D, d_sae, K, normalizer=Normalizer(D, store.mean, store.std), seed=1).eval()
    sae.W_dec[:DIRECTIONS] = directions()[:d_sae]
    sae.W_enc.copy_(sae.W_dec)
    x = store.features(slice(0, images)).flatten(0, 1)
    sae.calibrate(x.split(4096), len(x))
    some = sae.normalizer.normalize(x[:4096])
    rebuilt = sae.code(some).decode(sae.W_dec, sae.b_pre)
    sae.W_dec *= (some * rebuilt).sum() / rebuilt.square().sum()  # of several latents for one direction, each a part
    sae.save(folder, backbone=store.backbone, features=store.kind, layer=store.layer, config={})


# --- contenders ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Task:
    """What is evaluated: an SAE and the first ``images`` of the store, both in ``root``."""

    root: str
    d_sae: int
    images: int

    @property
    def run(self) -> Path:
        return Path(self.root) / f"sae-{self.d_sae}"

    @property
    def store(self) -> FeatureStore:
        return FeatureStore.open(Path(self.root) / "store")

    def judge(self, d: int = 384) -> Tensor:
        """Embeddings [images, d] of another encoder: images of a class are alike."""
        draw = torch.Generator().manual_seed(2)
        kinds = torch.randn(CLASSES, d, generator=draw)[torch.arange(self.images) % CLASSES]
        return kinds + torch.randn(self.images, d, generator=draw)


def streamed(task: Task, folder: Path, saes: int = 1) -> list[ScoringPass]:
    """The pass, or that of several SAEs at once, finished."""
    store = task.store
    judge, sae, span = ImageEmbeddings(store), SAE.load(task.run), range(task.images)
    passes = []
    for i in range(saes):
        metrics = core_metrics(sae, store, judge) | {"moran": Moran(sae.d_sae, GRID, **MORAN, row_standardized=True)}
        passes.append(ScoringPass(task.run, store, judge, folder / str(i), metrics, ["max"], span))
    stream(passes)
    return passes


def scored(task: Task, done: ScoringPass) -> Found:
    """The figures of a pass."""
    computed = {name: value for metric in done.metrics.values() for name, value in metric.compute().items()}
    top, judge, mono = done.top(TOP), task.judge(), done.metrics["mono"]
    assert isinstance(mono, MonoScore)
    latents = m5.choose_live(top.values[:, 0])
    top = (top.images[latents], top.values[latents], mono.minimum()[latents])
    computed |= m5.summarize(m5.monosemanticity(*top, judge), m5.baseline(judge))
    names = ("moran", "moran_evaluable", "fvu", "l0", "dead_share", "monosemanticity")
    done.close()
    raw, rebuilt = (done.pools[name, "max"].mapped() for name in ("features", "reconstruction"))
    return Found({name: float(computed[name]) for name in names}, raw, rebuilt, done.codes.matrix)


def ours(task: Task, folder: Path) -> Found:
    return scored(task, streamed(task, folder)[0])


def _dense(dtype: torch.dtype, one_pass: bool) -> Callable[[Task, Path], Found]:
    options = {"moran": MORAN, "top": TOP, "dtype": dtype, "one_pass": one_pass}
    return lambda task, folder: dense(task.run, task.store, task.images, task.judge(), **options)


CONTENDERS: dict[str, Callable[[Task, Path], Found]] = {
    "ours": ours, "dense": _dense(torch.float32, False), "dense, one pass": _dense(torch.float32, True),
    "dense bf16": _dense(torch.bfloat16, False), "dense, one pass bf16": _dense(torch.bfloat16, True),
}  # fmt: skip


def call(function: Callable, task: Task, *options: int) -> Callable[[], None]:
    """``function`` of a task and an empty folder, which is gone afterwards."""

    def run() -> None:
        with TemporaryDirectory(dir=task.root) as folder:
            function(task, Path(folder), *options)

    return run


def check(found: dict[str, Found]) -> dict[str, float]:
    """By how much each contender's figures differ from ours, relatively, at worst; of pooled arrays their distance.

    RuntimeError where that is more than its TOLERANCE.
    """
    expected, worst = found["ours"], {}
    for name, each in found.items():
        apart = {key: abs(each.scores[key] - value) / max(abs(value), 0.2) for key, value in expected.scores.items()}
        pools = [(csr_matrix(one.raw), csr_matrix(one.rebuilt), one.codes()) for one in (each, expected)]
        for key, theirs, mine in zip(("raw", "rebuilt", "codes"), *pools, strict=True):
            apart[key] = float(norm(theirs - mine) / norm(mine))
        key = max(apart, key=lambda what: apart[what] if apart[what] == apart[what] else np.inf)
        worst[name] = apart[key]
        if not worst[name] <= TOLERANCE["bf16" if name.endswith("bf16") else ""]:
            raise RuntimeError(f"{name} differs from ours by {apart[key]:.2g} in {key}; they do not compute the same.")
    return worst


# --- cases ---------------------------------------------------------------------------------------------------
def time_pass(task: Task, names: Sequence[str], args: argparse.Namespace) -> list[Row]:
    """Contenders on the same images."""
    if len(names) > 1:
        with TemporaryDirectory(dir=task.root) as folder:
            apart = check({name: CONTENDERS[name](task, Path(folder)) for name in names})  # warms them up, too
        print(f"d_sae {task.d_sae}: relative distance from our figures:", {k: f"{v:.1e}" for k, v in apart.items()})
    seconds = interleaved({name: call(CONTENDERS[name], task) for name in names}, args.repeats, 0)
    memory = {name: peak(name, task, args.threads) for name in names if args.memory}
    return [Row.of(case_of("pass", task), name, taken, memory.get(name)) for name, taken in seconds.items()]


def time_second(task: Task, args: argparse.Namespace) -> list[Row]:
    """One SAE, and two that share the stream."""
    calls = {"ours": call(streamed, task), "two SAEs": call(streamed, task, 2)}
    seconds = interleaved(calls, args.repeats, 1)
    more = np.median(seconds["two SAEs"]) / np.median(seconds["ours"]) - 1
    print(f"d_sae {task.d_sae}: a second SAE of the stream adds {100 * more:.0f} % of what the first one takes.")
    return [Row.of(case_of("second SAE", task), name, taken) for name, taken in seconds.items()]


def time_probes(task: Task, args: argparse.Namespace) -> list[Row]:
    """What is computed of pooled arrays, by scikit-learn; once where that takes minutes."""
    names = [f"class {c}" for c in range(min(CLASSES, task.images // 8))]
    groups = {f"group {g}": names[g : g + 5] for g in range(0, len(names), 5)}
    labels = task.store.labels[: task.images].numpy() % len(names)
    with TemporaryDirectory(dir=task.root) as folder:
        found = ours(task, Path(folder))
        raw, rebuilt, codes = np.array(found.raw), np.array(found.rebuilt), found.codes()
    probe = fit_raw(raw, labels)
    calls: dict[str, Callable] = {
        "raw probe, once a backbone": lambda: fit_raw(raw, labels),
        "preservation": lambda: preservation(probe, rebuilt, labels),
        "preservation with a probe of codes": lambda: preservation(probe, rebuilt, labels, codes),
        "sparse probing": lambda: sparse_probing(codes, labels),
        "absorption": lambda: absorption(codes, labels, groups, names),
    }
    seconds = interleaved(calls, args.repeats if task.images < 1000 else 1, 0)
    return [Row.of(case_of("probes", task), name, taken) for name, taken in seconds.items()]


def case_of(what: str, task: Task) -> str:
    return f"{what} d{task.d_sae}, {task.images} images"


def peak(name: str, task: Task, threads: int) -> float:
    """Peak MB of a contender in a process of its own."""
    what = json.dumps([name, asdict(task), threads])
    return peak_mb([sys.executable, "-m", "experiments.bench.evaluate", "--measure", what])


def measure(what: str) -> None:
    """In a child process: print the peak memory of one contender."""
    name, task, threads = json.loads(what)
    torch.set_num_threads(threads)
    call(CONTENDERS[name], Task(task["root"], task["d_sae"], 2))()  # imports and libraries are not counted
    print(json.dumps({"peak_mb": measure_peak(call(CONTENDERS[name], Task(**task)), "cpu")}))


def main() -> None:
    parser = shared_parser(__doc__, "64 images, d_sae 3072")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--dense-images", type=int, default=200, help="images that dense contenders are timed on")
    parser.add_argument("--d-sae", type=int, nargs="+", default=[6144, 24576])
    parser.add_argument("--no-probes", action="store_true")
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
        return
    torch.set_num_threads(args.threads)
    if args.quick:
        args.images, args.dense_images, args.d_sae, args.repeats = 64, 64, [3072], 2
    rows: list[Row] = []
    with TemporaryDirectory() as root:
        store = write_store(Path(root) / "store", 2 * args.images)
        for d_sae in args.d_sae:
            few, whole, twice = (Task(root, d_sae, n) for n in (args.dense_images, args.images, 2 * args.images))
            save_sae(few.run, store, d_sae)
            rows += time_pass(few, list(CONTENDERS), args)
            for task in (whole, twice) if whole != few else (twice,):
                rows += time_pass(task, ["ours"], args)
            rows += time_second(few, args)
            if not args.no_probes:
                rows += time_probes(whole, args)
            if args.json:
                write_json(args.json, rows)
    print_table(rows)


if __name__ == "__main__":
    importlib.import_module("experiments.bench.evaluate").main()
