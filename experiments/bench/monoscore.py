"""MonoScore over N images: all pairs, the paper's linear form on dense activations, and ours on sparse codes.

    python -m experiments.bench.monoscore [--quick] [--json FILE] [--plot FILE] [--sizes 1024 …] [--device cuda]

``linear`` is Algorithm 2's accumulation alone, in float32, with the activations already min–max scaled; ``two passes``
adds the pass that finds their range. ``pairwise`` is Algorithm 1 with blocks of images beside each anchor. They are
timed up to --dense-to and --pairwise-to images. Batches of 2048 are made before the clock starts and four of them are
used again and again, so that N is not bounded by memory; peak memory is that of a fresh process and includes them.
``step`` cases are whole training steps without MonoLoss, with it (``ours``), with its memory, at every second step, and
dense as in the paper.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from experiments.bench.contenders import ours as training_step
from experiments.bench.timing import Row, interleaved, measure_peak, peak_mb, print_table, shared_parser, write_json
from experiments.bench.train_step import batches as features
from sae_lightning.metrics import MonoScore
from sae_lightning.saes import SparseCodes
from sae_lightning.saes.monoloss import Memory, dense_mono_loss, mono_loss

D, D_SAE, K, BATCH, DISTINCT = 768, 8192, 64, 2048, 4
SIZES = [2**n for n in range(10, 21, 2)]
Batch = tuple[SparseCodes, Tensor]


def make_batches(n: int, device: str) -> list[Batch]:
    """Codes with K active latents a sample, some far more frequent than others, and float32 embeddings."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.rand(D_SAE, generator=generator).pow(3).expand(min(n, BATCH), -1)
    made = []
    for _ in range(min(DISTINCT, -(-n // BATCH))):
        latents = torch.multinomial(frequency, K, generator=generator).sort(1).values
        values = torch.rand(latents.numel(), generator=generator) + 0.1
        offsets = torch.arange(0, latents.numel() + 1, K)
        codes = SparseCodes(latents.flatten().to(device), values.to(device), offsets.to(device), D_SAE)
        made.append((codes, torch.randn(len(latents), D, generator=generator).to(device) + 0.2))
    return made


def ours(made: list[Batch], n: int) -> Callable[[], Tensor]:
    def run() -> Tensor:
        metric = MonoScore(D_SAE, D).to(made[0][1].device)
        for i in range(-(-n // BATCH)):
            metric.update(*made[i % len(made)])
        return metric.scores()

    return run


def linear(made: list[Batch], n: int, with_range: bool = False) -> Callable[[], Tensor]:
    """Algorithm 2 in mini-batches, with matrix products, as the paper describes its implementation."""
    dense = [(codes.to_dense(), torch.nn.functional.normalize(h, dim=1)) for codes, h in made]

    def run() -> Tensor:
        low, high = dense[0][0].new_zeros(D_SAE), dense[0][0].new_ones(D_SAE)
        u, v, w = low.clone(), low.clone(), dense[0][0].new_zeros(D, D_SAE)
        if with_range:
            for i in range(-(-n // BATCH)):
                a = dense[i % len(dense)][0]
                low, high = torch.minimum(low, a.amin(0)), torch.maximum(high, a.amax(0))
        for i in range(-(-n // BATCH)):
            a, h = dense[i % len(dense)]
            a = (a - low) / (high - low) if with_range else a
            u += a.sum(0)
            v += a.square().sum(0)
            w.addmm_(h.T, a)
        above, below = w.square().sum(0) - v, u.square() - v
        return torch.where(below > 0, above / below, 0)

    return run


def pairwise(made: list[Batch], n: int, block: int = 2048) -> Callable[[], Tensor]:
    """Algorithm 1: every image as the anchor of the blocks of images after it."""
    a = torch.cat([made[i % len(made)][0].to_dense() for i in range(-(-n // BATCH))])
    h = torch.nn.functional.normalize(torch.cat([made[i % len(made)][1] for i in range(-(-n // BATCH))]), dim=1)

    def run() -> Tensor:
        low, high = a.amin(0), a.amax(0)
        scaled = (a - low) / (high - low).clamp_min(1e-12)
        above, below = torch.zeros_like(low), torch.zeros_like(low)
        for anchor in range(n - 1):
            for start in range(anchor + 1, n, block):
                rest = slice(start, start + block)
                s = h[rest] @ h[anchor]
                above += scaled[anchor] * (s @ scaled[rest])
                below += scaled[anchor] * scaled[rest].sum(0)
        return torch.where(below > 0, above / below, 0)

    return run


CONTENDERS: dict[str, Callable[[list[Batch], int], Callable[[], Tensor]]] = {
    "ours": ours, "linear": linear, "two passes": lambda made, n: linear(made, n, True), "pairwise": pairwise,
}  # fmt: skip


def time_size(args: argparse.Namespace, n: int) -> list[Row]:
    """Rows of one number of images."""
    made = make_batches(n, args.device)
    largest = {"pairwise": args.pairwise_to, "linear": args.dense_to, "two passes": args.dense_to}
    names = [name for name in CONTENDERS if n <= largest.get(name, n)]
    runs = {name: CONTENDERS[name](made, n) for name in names}
    check(runs)
    quick = {name: run for name, run in runs.items() if name != "pairwise"}
    seconds = interleaved(quick, args.repeats, 0, args.device)  # check has warmed them up
    if "pairwise" in runs:
        seconds |= interleaved({"pairwise": runs["pairwise"]}, args.repeats if n <= 1024 else 1, 0, args.device)
    rows = []
    for name, taken in seconds.items():
        memory = None
        if args.memory:
            what = json.dumps([name, n, args.device])
            memory = peak_mb([sys.executable, "-m", "experiments.bench.monoscore", "--measure", what])
        rows.append(Row.of(f"score N{n}", name, taken, memory))
    return rows


def check(runs: dict[str, Callable[[], Tensor]]) -> None:
    """RuntimeError unless all contenders find the same scores (to float32's precision; ours is exact)."""
    expected = runs["ours"]().float()
    for name, run in runs.items():
        if name != "pairwise":
            worst = float((run().float() - expected).abs().max())
            if not worst < 1e-2:
                raise RuntimeError(f"{name} differs from ours by {worst}; they do not compute the same.")


def time_steps(args: argparse.Namespace) -> list[Row]:
    """Whole training steps with and without MonoLoss at batch 2048, d_sae 8192."""
    x = features(BATCH, args.device)
    rows = []
    for variant in ("topk", "batchtopk"):
        for precision in ("32", "bf16"):
            memory = Memory.empty(0.9, D_SAE, D, x)
            terms = {
                "without": None, "ours": mono_loss, "dense": _dense,
                "ours, memory": lambda codes, raw, memory=memory: mono_loss(codes, raw, memory),
            }  # fmt: skip
            steps = {
                name: training_step(variant, term)(D, D_SAE, K, BATCH, args.device, precision)
                for name, term in terms.items()
            }
            calls = {name: (lambda step=step: step(x)) for name, step in steps.items()}
            calls["every 2nd"] = _alternating(training_step, variant, precision, x, args.device)
            seconds = interleaved(calls, args.step_repeats, 3, args.device)
            rows += [Row.of(f"step {variant} {precision}", name, taken) for name, taken in seconds.items()]
    return rows


def _dense(codes: SparseCodes, raw: Tensor) -> Tensor:
    return dense_mono_loss(codes.to_dense(), raw.float())


def _alternating(build: Callable, variant: str, precision: str, x: Tensor, device: str) -> Callable[[], None]:
    """A step whose MonoLoss is computed at every second call."""
    calls = 0

    def every_second(codes: SparseCodes, raw: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return mono_loss(codes, raw) if calls % 2 else codes.values.new_zeros(())

    step = build(variant, every_second)(D, D_SAE, K, BATCH, device, precision)
    return lambda: step(x)


def plot(rows: list[Row], path: str) -> None:
    """Seconds and peak memory over N on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    time_axis, memory_axis = figure.subplots(1, 2)
    scores = [row for row in rows if row.case.startswith("score ")]
    for name in dict.fromkeys(row.contender for row in scores):
        mine = [row for row in scores if row.contender == name]
        sizes = [int(row.case.removeprefix("score N")) for row in mine]
        time_axis.loglog(sizes, [row.median_s for row in mine], "o-", label=name)
        if all(row.peak_mb is not None for row in mine):
            memory_axis.loglog(sizes, [max(1.0, row.peak_mb or 0) for row in mine], "o-", label=name)
    for axis, label in ((time_axis, "seconds"), (memory_axis, "peak memory (MB)")):
        axis.set(xlabel="images N", ylabel=label)
        axis.grid(alpha=0.3)
    time_axis.legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def measure(what: str) -> None:
    """In a child process: print the peak memory of one contender with its batches."""
    name, n, device = json.loads(what)
    torch.set_num_threads(2)
    CONTENDERS[name](make_batches(64, device), 64)()  # imports and libraries are not counted
    run = lambda: CONTENDERS[name](make_batches(n, device), n)()  # noqa: E731
    print(json.dumps({"peak_mb": measure_peak(run, device)}))


def main() -> None:
    parser = shared_parser(__doc__, "up to 16,384 images, pairwise up to 256")
    parser.add_argument("--plot", metavar="FILE", help="draw time and memory over N there")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--pairwise-to", type=int, default=4096, help="largest N of the pairwise form")
    parser.add_argument("--dense-to", type=int, default=65536, help="largest N of the dense linear form")
    parser.add_argument("--step-repeats", type=int, default=15)
    parser.add_argument("--no-steps", action="store_true", help="only the scores")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
        return
    torch.set_num_threads(args.threads)
    if args.quick:
        args.sizes, args.pairwise_to, args.repeats, args.step_repeats = [256, 2048, 16384], 256, 2, 3
    rows: list[Row] = []
    with Progress(transient=True) as progress:
        for n in progress.track(args.sizes, description="Timing"):
            rows += time_size(args, n)
    if not args.no_steps:
        rows += time_steps(args)
    if args.json:
        write_json(args.json, rows)
    if args.plot:
        plot(rows, args.plot)
    print_table(rows)


if __name__ == "__main__":
    importlib.import_module("experiments.bench.monoscore").main()
