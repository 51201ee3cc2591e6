"""Feature loaders as people have them, on the same synthetic features: GB/s, memory, waiting, extraction.

    python -m experiments.bench.features [--quick] [--json FILE] [--gb 4] [--data FOLDER] [--contenders ours lmdb]

``stream cold``, ``stream warm``: seconds a GB (10**9 bytes) of shuffled batches of 8192 tokens of 768, one epoch or
``--seconds``. Cold: the contender's files were dropped from the page cache, checked with mincore; what a hypervisor
keeps is out of reach. Warm: all its files were read from start to end just before. ``stream second epoch`` follows a
whole cold one, on the page cache as that has left it, which can be slower to read. Each pass runs in a process of its
own that has done its imports; the clock starts before the iterator is made, so starting worker processes counts,
opening does not. Every repeat runs all contenders once, beginning with another. ``sequential`` reads the files of
ours, or plain shards without it, and is measured just before every cold pass of another contender, because the speed
of disks that others share changes by the second; ``memcpy`` copies as many bytes in memory.
``memory``: the rise of resident memory of the process and its workers in a cold pass of its own.
``training waits``, ``encoder busy``: shares of time from 0 to 1, under the same keys of the json file.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import statistics
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.bench.feature_peers import PEERS
from experiments.bench.feature_peers.extraction import EXTRACTIONS, extract, make_pictures
from experiments.bench.feature_peers.results import Result, print_results, rows
from experiments.bench.feature_peers.stored import stored
from experiments.bench.feature_peers.stream import Pass, epochs, peak
from experiments.bench.feature_peers.synthetic import Features
from experiments.bench.feature_peers.training import train
from experiments.bench.isolated import isolated, preload
from experiments.bench.timing import shared_parser, write_json

BATCH_TOKENS = 8192
CASES = {
    "stream": ("datasets", "lmdb", "litdata", "sae_lightning.features"),
    "memory": ("datasets", "lmdb", "litdata", "sae_lightning.features"),
    "training": ("experiments.bench.contenders", "sae_lightning.features"),
    "extraction": ("timm", "torchvision.transforms.v2", "sae_lightning.features"),
}
"""Cases, and what their processes need to import."""
YARDSTICKS = ("sequential", "memcpy")
STREAMS = ("cold", "warm", "second epoch")
SEQUENTIAL = ("sequential", "")
Contender = tuple[str, str]


class Bench:
    """One run: the options, the folders with data, and the results so far."""

    def __init__(self, args: argparse.Namespace, folder: Path, progress: Progress) -> None:
        self.args, self.folder, self.progress = args, folder, progress
        self.results: list[Result] = []
        self.folders = stored(args.contenders, Features.of_size(args.gb), folder, progress)

    def options(self, names: list[str]) -> list[Contender]:
        """Every contender of ``names`` whose data could be written, with each of its options."""
        return [(name, option) for name in names if name in self.folders for option in PEERS[name].OPTIONS]

    def rounds(self, contenders: list[Contender], title: str, repeats: int) -> list[tuple[int, Contender]]:
        """Repeat and contender, all contenders a repeat, each repeat beginning with another; moves the bar."""
        order = [
            (repeat, contenders[(place + repeat) % len(contenders)])
            for repeat in range(repeats)
            for place in range(len(contenders))
        ]
        return self.progress.track(order, description=title)  # type: ignore[return-value]

    def add(self, result: Result) -> None:
        """Keep a result; the file always holds what is known."""
        self.results.append(result)
        if self.args.json:
            write_json(self.args.json, rows(self.results))

    def stream(self) -> None:
        """Seconds a GB: cold, warm and in the second epoch."""
        contenders = self.options(self.args.contenders)
        passes: dict[tuple[str, Contender], list[Pass]] = {}
        beside: dict[tuple[str, Contender], list[float]] = {}
        for _, contender in self.rounds(contenders, "Streaming", self.args.repeats):
            for state in ("cold", "warm")[contender[0] == "memcpy" :]:
                if state == "cold" and "sequential" in self.folders and contender[0] != "sequential":
                    yardstick = self.passes("cold", SEQUENTIAL)["cold"].seconds_a_gb
                    beside.setdefault((state, contender), []).append(yardstick)
                for case, taken in self.passes(state, contender).items():
                    passes.setdefault((case, contender), []).append(taken)
        for (case, contender), taken in sorted(passes.items(), key=lambda item: STREAMS.index(item[0][0])):
            first = statistics.median(one.first for one in taken)
            remark = next((one.remark for one in taken if one.remark), "")
            values = [one.seconds_a_gb for one in taken]
            self.add(
                Result(f"stream {case}", *contender, values, first, note=remark, beside=beside.get((case, contender)))
            )

    def passes(self, state: str, contender: Contender) -> dict[str, Pass]:
        """Passes of a contender in a process of its own."""
        return isolated(epochs, state, *contender, self.folders[contender[0]], BATCH_TOKENS, self.args.seconds)

    def memory(self) -> None:
        """Peak resident memory while streaming."""
        contenders = [c for c in self.options(self.args.contenders) if c[0] not in YARDSTICKS]
        for _, (name, option) in self.rounds(contenders, "Memory", 1):
            taken, memory = isolated(peak, name, option, self.folders[name], BATCH_TOKENS, self.args.seconds)
            note = f"{memory.mapped_mb:.0f} MB of it mapped files" if memory.mapped_mb > 16 else ""
            self.add(Result("memory", name, option, [taken.seconds_a_gb], taken.first, memory.peak_mb, note))

    def training(self) -> None:
        """Share of a training's time that it waits for batches."""
        chosen = [name for name in self.args.contenders if name not in YARDSTICKS]
        if set(self.args.contenders) == set(PEERS):
            chosen = ["ours", "torch .pt"]
        contenders, waits = self.options(chosen), {}
        for _, (name, option) in self.rounds(contenders, "Training", self.args.repeats):
            d_in = Features.of_size(self.args.gb).shape[2]
            taken = isolated(train, name, option, self.folders[name], BATCH_TOKENS, self.args.steps, d_in)
            waits.setdefault((name, option), []).append(taken)
        for contender, taken in waits.items():
            step = sum(one.seconds for one in taken) / len(taken) / self.args.steps
            own = [one.counted / one.seconds for one in taken if one.counted is not None]
            note = f"{step:.3f} s a step" + (f", its own count {sorted(own)[len(own) // 2]:.1%}" if own else "")
            self.add(Result("training waits", *contender, [one.share for one in taken], note=note))

    def extraction(self) -> None:
        """Share of an extraction's time that the encoder works."""
        pictures, out = self.folder / f"pictures-{self.args.pictures}", self.folder / "extracted"
        make_pictures(pictures, self.args.pictures)
        found: dict[Contender, list] = {}
        for _, (name, option) in self.rounds([(name, "") for name in EXTRACTIONS], "Extracting", self.args.repeats):
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            try:
                taken = isolated(extract, name, pictures, out, self.args.device)
            except ImportError as error:
                print(f"{name} is left out of the extraction: {error}", file=sys.stderr)
                continue
            found.setdefault((name, option), []).append(taken)
        for contender, taken in found.items():
            note = f"{sum(one.images for one in taken) / sum(one.seconds for one in taken):.1f} pictures a second"
            self.add(Result("encoder busy", *contender, [one.share for one in taken], note=note))


def parse() -> argparse.Namespace:
    parser = shared_parser(__doc__, "0.4 GB, one repeat, a second or two each", memory=False)
    parser.add_argument("--gb", type=float, default=4.0, help="size of the features, default 4")
    parser.add_argument(
        "--data", metavar="FOLDER", help="keep the features there and use them again; default a temporary folder"
    )
    parser.add_argument("--contenders", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seconds", type=float, help="end each pass after that time; default a whole epoch")
    parser.add_argument("--steps", type=int, default=30, help="steps of the training, default 30")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the encoder")
    parser.add_argument("--pictures", type=int, help="to extract, default 64, on a GPU 2048")
    args = parser.parse_args()
    if args.quick:
        args.gb, args.repeats, args.seconds, args.steps = min(args.gb, 0.4), 1, 1.5, 5
    if args.pictures is None:
        args.pictures = 2048 if args.device != "cpu" else 8 if args.quick else 64
    return args


def main() -> None:
    args = parse()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    if args.data:
        Path(args.data).mkdir(parents=True, exist_ok=True)
    preload(*dict.fromkeys(module for case in args.cases for module in CASES[case]))
    home = nullcontext(args.data) if args.data else tempfile.TemporaryDirectory(prefix="feature-bench-")
    with home as folder, Progress(*columns, transient=True) as progress:
        bench = Bench(args, Path(folder), progress)
        for case in args.cases:
            getattr(bench, case)()
    print(
        f"{args.gb:g} GB of features, {args.repeats} repeats, "
        f"{os.cpu_count()} processors, {torch.get_num_threads()} threads"
    )
    print_results(bench.results)


if __name__ == "__main__":
    importlib.import_module("experiments.bench.features").main()
