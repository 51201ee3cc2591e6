"""Which files should hold features? Speed of writing, of reading in order and in random blocks, and size.

    python -m experiments.bench.formats [--quick] [--json FILE] [--gb 2] [--data FOLDER] [--candidates ...]

Everything is read into a tensor in memory that is there already. ``sequential``: all images in runs of 16 MiB, each
thread its own stretch; ``1 MiB`` and ``4 MiB``: blocks of 4 and 14 consecutive images in random order, each once.
Cold: the files were dropped from the page cache, checked with mincore; warm: read just before. Numbers are seconds a
GB (10**9 bytes). Every repeat runs all candidates, beginning with another, each pass in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from experiments.bench.feature_peers.synthetic import Features
from experiments.bench.format_candidates import CANDIDATES, Reader
from experiments.bench.isolated import isolated, preload
from experiments.bench.pagecache import cold, evict, files_in, warm
from experiments.bench.timing import Row, shared_parser, write_json

PATTERNS = {"sequential": 56, "1 MiB": 4, "4 MiB": 14}  # images of 294 KiB a read
THREADS = (1, 4)
CASES = list(product(("cold", "warm"), PATTERNS, THREADS))


def case_name(state: str, pattern: str, threads: int) -> str:
    """For example ``cold 4 MiB 1 thread``."""
    return f"{state} {pattern} {threads} thread{'s' * (threads > 1)}"


def write(name: str, folder: Path, n_images: int) -> tuple[float, float]:
    """Write a candidate's files; seconds until they are on the disk, less those of making the features, and bytes."""
    with tempfile.TemporaryDirectory() as scratch:  # what a library imports on first use does not count
        CANDIDATES[name].write(Features(1), Path(scratch))
    features = Features(n_images)
    start = time.perf_counter()
    for _ in features:
        pass
    made = time.perf_counter() - start
    start = time.perf_counter()
    CANDIDATES[name].write(features, folder)
    evict(files_in(folder))
    seconds = time.perf_counter() - start - made
    return seconds, float(sum(512 * path.stat().st_blocks for path in files_in(folder)))


def read(
    name: str, folder: Path, n_images: int, state: str, pattern: str, threads: int, limit: float
) -> tuple[float, str]:
    """Seconds a GB, and what was amiss with the page cache."""
    remark = cold(folder) if state == "cold" else warm(folder)
    readers = [CANDIDATES[name].open(folder) for _ in range(threads)]
    seconds = seconds_a_gb(readers, n_images, PATTERNS[pattern], pattern != "sequential", limit)
    return seconds, remark


def seconds_a_gb(readers: list[Reader], n_images: int, run: int, shuffled: bool, limit: float) -> float:
    """All threads start together on their shares of the runs; ends when all are read or ``limit`` seconds are over."""
    starts = np.arange(0, n_images, run)
    if shuffled:
        np.random.default_rng(0).shuffle(starts)
    tensors = [torch.ones(run, 196, 768, dtype=torch.float16) for _ in readers]
    done = [0] * len(readers)
    barrier = threading.Barrier(len(readers) + 1)

    def work(place: int, mine: np.ndarray) -> None:
        out = tensors[place]
        barrier.wait()
        for first in mine.tolist():
            count = min(run, n_images - first)
            readers[place](first, count, out[:count])
            done[place] += count
            if time.perf_counter() - start > limit:
                return

    shares = np.array_split(starts, len(readers))
    workers = [threading.Thread(target=work, args=(place, share)) for place, share in enumerate(shares)]
    for worker in workers:
        worker.start()
    start = time.perf_counter()
    barrier.wait()
    for worker in workers:
        worker.join()
    return (time.perf_counter() - start) / (sum(done) * 196 * 768 * 2 / 1e9)


class Bench:
    """One run over the chosen candidates."""

    def __init__(self, args: argparse.Namespace, home: Path, progress: Progress) -> None:
        self.args, self.home, self.progress = args, home, progress
        self.features = Features.of_size(args.gb)
        self.n_images = self.features.shape[0]
        self.values: dict[tuple[str, str], list[float]] = {}
        self.remarks: dict[tuple[str, str], str] = {}
        self.folders: dict[str, Path] = {}

    def run(self) -> None:
        """Write everything, then measure; the json file always holds what is known."""
        for name, _ in self.progress.track(self.rounds(self.args.candidates, [None]), description="Writing"):
            folder = self.home / name.replace(" ", "-")
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            try:
                seconds, size = isolated(write, name, folder, self.n_images)
            except ImportError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
            self.folders[name] = folder
            self.values.setdefault(("write", name), []).append(seconds / (self.features.n_bytes / 1e9))
            self.values["size", name] = [size / self.features.n_bytes]
        order = self.rounds([name for name in self.args.candidates if name in self.folders], CASES)
        for name, case in self.progress.track(order, description="Reading"):
            value, remark = isolated(read, name, self.folders[name], self.n_images, *case, self.args.seconds)
            self.values.setdefault((case_name(*case), name), []).append(value)
            if remark:
                self.remarks[case_name(*case), name] = remark
            if self.args.json:
                write_json(self.args.json, self.rows())

    def rounds(self, names: list[str], cases: Sequence) -> list[tuple[str, Any]]:
        """Every candidate in every case, as often as there are repeats, each repeat beginning with another."""
        return [
            (names[(place + repeat) % len(names)], case)
            for repeat in range(self.args.repeats)
            for case in cases
            for place in range(len(names))
        ]

    def rows(self) -> list[Row]:
        """``size`` is bytes on disk for each byte of features, all else seconds a GB."""
        return [Row.of(case, name, values) for (case, name), values in sorted(self.values.items())]

    def print_table(self) -> None:
        """GB/s of each candidate in each case, and in how much room."""
        medians = {(row.case, row.contender): row.median_s for row in self.rows()}
        table = Table(title=f"GB/s, median of {self.args.repeats}; {self.args.gb:g} GB", title_justify="left")
        table.add_column("case", no_wrap=True)
        for name in self.folders:
            table.add_column(name, justify="right")
        for case in ["write", *(case_name(*case) for case in CASES)]:
            best = min(medians[case, name] for name in self.folders)
            cells = [
                f"{1 / medians[case, name]:.2f}" + (" *" if medians[case, name] == best else "")
                for name in self.folders
            ]
            table.add_row(case, *cells)
        table.add_row("bytes on disk a byte", *[f"{medians['size', name]:.3f}" for name in self.folders])
        Console().print(table)
        print("* fastest of its row")
        for (case, name), remark in self.remarks.items():
            print(f"{name}, {case}: {remark}")


def main() -> None:
    parser = shared_parser(__doc__, "a quarter of a GB, one repeat, a second a pass", memory=False)
    parser.add_argument(
        "--gb", type=float, default=2.0, help="size of the features, default 2; on disk seven times that"
    )
    parser.add_argument("--data", metavar="FOLDER", help="write there; default a temporary folder")
    parser.add_argument("--candidates", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--seconds", type=float, default=5.0, help="end each pass after that time, default 5")
    args = parser.parse_args()
    if args.quick:
        args.gb, args.repeats, args.seconds = 0.25, 1, 1.0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    preload("lmdb", "litdata")
    home = nullcontext(args.data) if args.data else tempfile.TemporaryDirectory(prefix="formats-bench-")
    with home as folder, Progress(*columns, transient=True) as progress:
        bench = Bench(args, Path(folder), progress)
        bench.run()
    bench.print_table()


if __name__ == "__main__":
    importlib.import_module("experiments.bench.formats").main()
