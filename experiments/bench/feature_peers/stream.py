"""One epoch of a contender against the clock: what a process does that was made for nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from experiments.bench.feature_peers import PEERS
from experiments.bench.feature_peers.memory import Memory, watch
from experiments.bench.pagecache import cold, warm

PAGE = 4096


@dataclass(frozen=True)
class Pass:
    """Bytes that one pass delivered, its seconds, seconds to the first batch, whether the limit cut it short, and
    what was amiss with the page cache."""

    n_bytes: int
    seconds: float
    first: float
    cut: bool
    remark: str

    @property
    def seconds_a_gb(self) -> float:
        """Seconds for each 10**9 bytes delivered."""
        return self.seconds / (self.n_bytes / 1e9)


def epochs(state: str, name: str, option: str, folder: Path, batch_tokens: int, limit: float | None) -> dict[str, Pass]:
    """A pass over files that are ``cold`` or ``warm``, see ``pagecache``; after a whole cold one a ``second`` epoch,
    on the page cache as the first has left it."""
    remark = cold(folder) if state == "cold" else warm(folder)
    option_values = PEERS[name].OPTIONS[option]
    passes = {state: one_pass(PEERS[name].loader(folder, batch_tokens, **option_values), limit, remark)}
    if state == "cold" and not passes["cold"].cut:
        passes["second epoch"] = one_pass(PEERS[name].loader(folder, batch_tokens, **option_values), limit)
    return passes


def one_pass(loader: Iterable[Tensor], limit: float | None = None, remark: str = "") -> Pass:
    """Take all batches, or those of the first ``limit`` seconds. The clock starts before the iterator is made, so that
    starting worker processes counts; opening the data set does not."""
    n_bytes, first, seconds, cut = 0, 0.0, 0.0, False
    start = time.perf_counter()
    batches = iter(loader)
    with closing(batches) if hasattr(batches, "close") else nullcontext():
        for batch in batches:
            touch(batch)
            n_bytes += batch.nbytes
            seconds = time.perf_counter() - start
            first = first or seconds
            if limit is not None and seconds > limit:
                cut = True
                break
    return Pass(n_bytes, seconds, first, cut, remark)


def touch(batch: Tensor) -> None:
    """Read one value of each page, so that lazily mapped memory is really there."""
    batch.reshape(-1)[:: PAGE // batch.element_size()].sum()


def peak(name: str, option: str, folder: Path, batch_tokens: int, limit: float | None) -> tuple[Pass, Memory]:
    """A pass over evicted files, whose seconds mean little, and the memory that it took."""
    passes = []

    def run() -> None:
        loader = PEERS[name].loader(folder, batch_tokens, **PEERS[name].OPTIONS[option])
        passes.append(one_pass(loader, limit))

    cold(folder)
    memory = watch(run)
    return passes[0], memory
