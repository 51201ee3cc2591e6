"""Whole training steps of ours against the dense reference and against peer packages, side by side in one process.

    python -m experiments.bench.train_step [--quick] [--json FILE] [--variants topk batchtopk] [--device cuda]
    python -m experiments.bench.train_step --levels [--quick] [--json FILE]

Every case is a variant, a shape and a precision; all contenders get the same batches. ``product`` is the encoder's
product alone. Peak memory is that of a fresh process which builds the contender and does two steps.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from itertools import product

import torch
from rich.progress import Progress

from experiments.bench.contenders import LOSSES, dense, encoder_product, ours
from experiments.bench.peers import PEERS, Builder
from experiments.bench.timing import Row, interleaved, measure_peak, peak_mb, print_table, shared_parser, write_json

D_IN = 768
SHAPES = {"expansion": (8, 16, 32), "k": (32, 64, 256), "batch": (2048, 8192)}


def contenders(variant: str, with_peers: bool) -> dict[str, Builder]:
    """Builders by name: ours, dense, product, and the peers that have the variant and can be imported."""
    found: dict[str, Builder] = {"ours": ours(variant)}
    reference = dense(variant)
    if reference is not None:
        found["dense"] = reference
    found["product"] = encoder_product
    return found | (PEERS.get(variant, {}) if with_peers else {})


def case_name(variant: str, expansion: int, k: int, batch: int, precision: str) -> str:
    """For example ``topk x16 k64 B2048 bf16``."""
    return f"{variant} x{expansion} k{k} B{batch} {precision}"


def batches(batch: int, device: str, d_in: int = D_IN) -> torch.Tensor:
    """Features of unit deviation with some structure: sums of 32 of 2048 directions and noise, [batch, d_in]."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(2048, d_in, generator=generator), dim=1)
    active = torch.rand(batch, 2048, generator=generator).topk(32, dim=1).indices
    x = directions[active].mul(1 + torch.rand(batch, 32, 1, generator=generator)).sum(1)
    x = x + 0.1 * torch.randn(batch, d_in, generator=generator)
    return ((x - x.mean(0)) / x.std()).to(device)


def time_case(args: argparse.Namespace, variant: str, expansion: int, k: int, batch: int, precision: str) -> list[Row]:
    """Rows of one case; a contender that cannot be built is left out with a line that says why."""
    x, steps = batches(batch, args.device), {}
    for name, build in contenders(variant, not args.no_peers).items():
        try:
            steps[name] = build(D_IN, expansion * D_IN, k, batch, args.device, precision)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    seconds = interleaved({n: (lambda s=s: s(x)) for n, s in steps.items()}, args.repeats, args.warmup, args.device)
    name = case_name(variant, expansion, k, batch, precision)
    rows = []
    for contender, taken in seconds.items():
        memory = None
        if args.memory and contender != "product":
            what = json.dumps([variant, contender, expansion, k, batch, precision, args.device])
            memory = peak_mb([sys.executable, "-m", "experiments.bench.train_step", "--measure", what])
        rows.append(Row.of(name, contender, taken, memory))
    return rows


def time_levels(args: argparse.Namespace, d_in: int, k: int, batch: int) -> list[Row]:
    """Rows of MSAE with levels k, 2k … d_sae = 8 · d_in, from its paper's start, and of a ReLU of that shape."""
    x = batches(batch, args.device, d_in)
    builders = {"relu": ours("relu"), "msae": ours("msae", ks=None, encoder_norm=0.1)}
    steps = {name: build(d_in, 8 * d_in, k, batch, args.device, "32") for name, build in builders.items()}
    seconds = interleaved({n: (lambda s=s: s(x)) for n, s in steps.items()}, args.repeats, args.warmup, args.device)
    return [Row.of(f"d_in {d_in} levels {k}…{8 * d_in} B{batch} 32", name, taken) for name, taken in seconds.items()]


def measure(what: str) -> None:
    """In a child process: print the peak memory of one contender's building and two steps."""
    variant, contender, expansion, k, batch, precision, device = json.loads(what)
    torch.set_num_threads(2)
    build = contenders(variant, True)[contender]
    build(16, 64, 4, 32, device, precision)(batches(32, device, 16))  # imports are not counted
    x = batches(batch, device)

    def run() -> None:
        step = build(D_IN, expansion * D_IN, k, batch, device, precision)
        step(x)
        step(x)

    print(json.dumps({"peak_mb": measure_peak(run, device)}))


def main() -> None:
    parser = shared_parser(__doc__, "TopK and BatchTopK in float32 at a small shape", repeats=5)
    parser.add_argument("--variants", nargs="+", choices=list(LOSSES), default=list(LOSSES))
    parser.add_argument("--precisions", nargs="+", choices=["32", "bf16"], default=["32", "bf16"])
    parser.add_argument("--all-shapes", action="store_true", help="expansion 8 16 32, k 32 64 256, batch 2048 8192")
    for name, usual in (("expansion", 16), ("k", 64), ("batch", 2048)):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=[usual], help=f"default {usual}")
    parser.add_argument("--levels", action="store_true", help="MSAE with levels up to d_sae against ReLU")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--no-peers", action="store_true", help="only ours, dense and the product")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
        return
    torch.set_num_threads(args.threads)
    if args.levels:
        shapes = [(128, 16, 1024), (128, 16, 4096), (384, 32, 2048), (768, 64, 2048)]
        rows = [row for shape in shapes[: 1 if args.quick else None] for row in time_levels(args, *shape)]
        if args.json:
            write_json(args.json, rows)
        print_table(rows, ratio_to="relu")
        return
    if args.quick:
        args.variants, args.precisions, args.repeats, args.warmup = ["topk", "batchtopk"], ["32"], 2, 1
        args.expansion, args.k, args.batch, args.all_shapes = [8], [64], [1024], False
    shapes = list(product(*(SHAPES.values() if args.all_shapes else (args.expansion, args.k, args.batch))))
    cases = list(product(args.variants, shapes, args.precisions))
    rows: list[Row] = []
    with Progress(transient=True) as progress:
        for variant, (expansion, k, batch), precision in progress.track(cases, description="Timing"):
            rows += time_case(args, variant, expansion, k, batch, precision)
            if args.json:
                write_json(args.json, rows)
    print_table(rows)


if __name__ == "__main__":
    importlib.import_module("experiments.bench.train_step").main()
