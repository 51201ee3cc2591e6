"""Resident memory of a process and its workers while something runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments.bench.timing import MB, measure_peak

EVERY = 0.05  # seconds


@dataclass
class Memory:
    """By how many MB the resident memory rose at its peak, and how many of them were mapped file pages, which the
    kernel may take back at any time."""

    peak_mb: float = 0.0
    mapped_mb: float = 0.0


def watch(run: Callable[[], None]) -> Memory:
    """``Memory`` of this process and its children during ``run``.

    The larger of two measures: the kernel's own high-water mark of this process, which misses workers, and the sum of
    proportional set sizes of all, in which shared memory counts once, sampled twenty times a second.
    """
    memory, before, stop = Memory(), _sizes(os.getpid()), threading.Event()

    def sample() -> None:
        while not stop.wait(EVERY):
            total, mapped = (now - then for now, then in zip(_sizes(os.getpid()), before, strict=True))
            if total / MB > memory.peak_mb:
                memory.peak_mb, memory.mapped_mb = total / MB, max(0, mapped) / MB

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        mark = measure_peak(run, "cpu")
    finally:
        stop.set()
        thread.join()
    memory.peak_mb = max(memory.peak_mb, mark)
    return memory


def _sizes(process: int) -> tuple[int, int]:
    """Bytes of proportional set size, and of its file pages, of ``process`` and its descendants."""
    total = mapped = 0
    for member in _family(process):
        try:
            lines = Path(f"/proc/{member}/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
        except OSError:  # it has just ended
            continue
        fields = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines}
        total, mapped = total + fields.get("Pss:", 0), mapped + fields.get("Pss_File:", 0)
    return total, mapped


def _family(process: int) -> list[int]:
    """``process`` and its descendants."""
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text(encoding="utf-8").rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
    family = [process]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return family
