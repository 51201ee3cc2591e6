"""What the feature benchmark found, and how it is told to a person and to a file."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from experiments.bench.timing import Row

SHARES = ("training waits", "encoder busy")
"""Cases whose numbers are shares of time, 0 to 1, under Row's names for seconds; all others are seconds a GB."""


@dataclass(frozen=True)
class Result:
    """The numbers of a contender in a case, one for each repeat; ``option`` is the loader's setting, ``beside`` what
    the sequential read took just before each, where that was measured."""

    case: str
    contender: str
    option: str
    values: Sequence[float]
    first_s: float | None = None
    peak_mb: float | None = None
    note: str = ""
    beside: Sequence[float] | None = None

    @property
    def median(self) -> float:
        """The middle one of the repeats."""
        return statistics.median(self.values)


def named(results: Sequence[Result]) -> list[Result]:
    """The results with, for every contender that ran with several options, the best of them under its bare name."""
    told: list[Result] = []
    for case, contender in dict.fromkeys((result.case, result.contender) for result in results):
        options = [result for result in results if (result.case, result.contender) == (case, contender)]
        if len(options) == 1:
            told += [replace(options[0], option="")]
            continue
        if case == "memory":
            best = min(options, key=lambda result: result.peak_mb or 0)
        else:
            best = (max if case == "encoder busy" else min)(options, key=lambda result: result.median)
        told += [replace(best, option=""), *options]
    return told


def rows(results: Sequence[Result]) -> list[Row]:
    """Rows for the json file; those with an option are named ``contender, option``."""
    return [Row.of(result.case, _name(result), list(result.values), result.peak_mb) for result in named(results)]


def _name(result: Result) -> str:
    return ", ".join(filter(None, (result.contender, result.option)))


def print_results(results: Sequence[Result]) -> None:
    """A table for each case, with the ratios in words; they are to the best option of each contender."""
    for case in dict.fromkeys(result.case for result in results):
        mine = [result for result in results if result.case == case]
        best = {result.contender: result for result in named(mine) if not result.option}
        table = Table(title=case, title_justify="left", title_style="bold")
        share = case in SHARES
        table.add_column("contender", no_wrap=True)
        for heading in ("median", "min", "max") if share else ("GB/s", "s a GB", "min", "max", "first batch s"):
            table.add_column(heading, justify="right")
        if case == "memory":
            table.add_column("peak MB", justify="right")
        table.add_column("in words")
        for result in mine:
            table.add_row(_name(result), *_cells(result, share), _words(result, best))
        Console(width=max(140, Console().width)).print(table)


def _cells(result: Result, share: bool) -> list[str]:
    if share:
        return [f"{value:.1%}" for value in (result.median, min(result.values), max(result.values))]
    seconds = [f"{value:.3f}" for value in (result.median, min(result.values), max(result.values))]
    cells = [f"{1 / result.median:.2f}", *seconds, "–" if result.first_s is None else f"{result.first_s:.3f}"]
    return cells if result.peak_mb is None else [*cells, f"{result.peak_mb:.0f}"]


def _words(result: Result, best: Mapping[str, Result]) -> str:
    """For example ``92 % of the sequential read; ours is 3.1 times as fast``."""
    words = [result.note]
    if result.case.startswith("stream") and result.contender != "memcpy":
        if "sequential" in best and result.contender != "sequential":
            share = _ratio(result.beside or best["sequential"].values, result.values)
            words.append(f"{100 * share:.0f} % of the sequential read")
        if "memcpy" in best:
            words.append(f"{100 * _ratio(best['memcpy'].values, result.values):.0f} % of memcpy")
        if "ours" in best and result.contender not in ("ours", "sequential"):
            words.append(f"ours is {_ratio(result.values, best['ours'].values):.1f} times as fast")
    if result.case == "training waits":
        words.append(f"the step waits {result.median:.1%} of its time for data")
    if result.case == "encoder busy":
        words.append(f"the encoder works {result.median:.1%} of the time")
    return "; ".join(filter(None, words))


def _ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """How many times faster the other is: the median over repeats of the two values that were measured in the same."""
    return statistics.median(a / b for a, b in zip(one, other, strict=False))
