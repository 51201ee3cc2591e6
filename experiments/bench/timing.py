"""Time and peak memory of callables side by side, and the table that compares them; knows nothing of SAEs."""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

MB = 2**20


# --- the command line ----------------------------------------------------------------------------------------
def shared_parser(about: str | None, quick: str, repeats: int = 3, memory: bool = True) -> argparse.ArgumentParser:
    """The options that benchmarks share: --quick, --json, --repeats, and with ``memory`` --threads and --memory.

    ``quick`` says what --quick leaves of the work. A child process that measures memory is given --measure.
    """
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--quick", action="store_true", help=quick)
    found.add_argument("--json", metavar="FILE", help="write the rows there")
    found.add_argument("--repeats", type=int, default=repeats)
    if memory:
        found.add_argument("--threads", type=int, default=2)
        found.add_argument("--memory", action="store_true", help="measure peak memory in child processes too")
        found.add_argument("--measure", help=argparse.SUPPRESS)
    return found


# --- time ----------------------------------------------------------------------------------------------------
def interleaved(
    contenders: Mapping[str, Callable[[], None]], repeats: int, warmup: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each call, ``repeats`` for each contender, after ``warmup`` untimed ones.

    All run in this process; every repeat calls each contender once, in an order shuffled with a fixed seed,
    so that a disturbance from outside or a clock that slows down meets all of them alike.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0; got repeats={repeats}, warmup={warmup}.")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    shuffle = random.Random(0).shuffle
    for repeat in range(warmup + repeats):
        order = list(contenders)
        shuffle(order)
        for name in order:
            elapsed = _seconds(contenders[name], device)
            if repeat >= warmup:
                seconds[name].append(elapsed)
    return seconds


def _seconds(call: Callable[[], None], device: str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


# --- memory --------------------------------------------------------------------------------------------------
def peak_mb(command: list[str]) -> float:
    """``peak_mb`` of the last JSON line that ``command`` prints, run as a child process.

    Raises RuntimeError, with the end of its standard error, when it fails or prints no such line.
    """
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode == 0:
        for line in reversed(child.stdout.splitlines()):
            found = _peak_in(line)
            if found is not None:
                return found
    raise RuntimeError(
        f"{' '.join(command)} ended with code {child.returncode} and no line with peak_mb; "
        f"the end of its errors: {child.stderr[-2000:].strip() or 'none'}"
    )


def _peak_in(line: str) -> float | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return float(record["peak_mb"]) if isinstance(record, dict) and "peak_mb" in record else None


def measure_peak(build_and_run: Callable[[], None], device: str) -> float:
    """MB (2**20 bytes) by which ``build_and_run`` raises the peak over what was held before it.

    On CUDA what PyTorch allocated; elsewhere resident memory. Meant for a fresh process that has made its imports:
    memory freed earlier in the same process is used again and not seen.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        build_and_run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MB
    before = _resident("VmRSS")
    _reset_peak()
    build_and_run()
    return max(0, _resident("VmHWM") - before) / MB


def _reset_peak() -> None:
    """Let Linux count VmHWM from now on; where it may not be reset it is the peak since the process began."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return


def _resident(field: str) -> int:
    """Bytes in a field of /proc/self/status; without /proc the peak since the process began."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


# --- results -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Row:
    """What one contender took in one case; ``peak_mb`` is None where memory was not measured."""

    case: str
    contender: str
    min_s: float
    median_s: float
    max_s: float
    peak_mb: float | None = None

    @classmethod
    def of(cls, case: str, contender: str, seconds: list[float], peak_mb: float | None = None) -> Row:
        """The row of a contender's timings."""
        return cls(case, contender, min(seconds), statistics.median(seconds), max(seconds), peak_mb)


def write_json(path: str | Path, rows: Iterable[Row]) -> None:
    """Write the rows as a list of records with Row's fields as keys."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


def print_table(rows: Iterable[Row], ratio_to: str = "ours") -> None:
    """Print a line a row: milliseconds, the median relative to that of ``ratio_to`` in the same case, peak MB."""
    rows = list(rows)
    reference = {row.case: row.median_s for row in rows if row.contender == ratio_to}
    table = Table("case", "contender")
    for heading in ("min ms", "median ms", "max ms", f"× {ratio_to}", "peak MB"):
        table.add_column(heading, justify="right")
    for row in rows:
        milliseconds = [f"{1000 * seconds:.1f}" for seconds in (row.min_s, row.median_s, row.max_s)]
        ratio = f"{row.median_s / reference[row.case]:.2f}" if row.case in reference else "–"
        memory = "–" if row.peak_mb is None else f"{row.peak_mb:.0f}"
        table.add_row(row.case, row.contender, *milliseconds, ratio, memory)
    Console().print(table)
