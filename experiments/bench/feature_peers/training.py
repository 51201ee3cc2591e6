"""A real training fed by a contender, and the share of its time that it waits for data."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from experiments.bench.feature_peers import PEERS
from experiments.bench.pagecache import cold

D_SAE, K = 8, 64  # d_sae in widths of the features
SKIPPED = 3  # steps before the clock starts: buffers fill, kernels are built


@dataclass(frozen=True)
class Waits:
    """Seconds of a training after its first steps, how many it waited for batches, by the loop's clock and by the
    loader's own count where it has one."""

    seconds: float
    waited: float
    counted: float | None

    @property
    def share(self) -> float:
        """Share of the time that was waited."""
        return self.waited / self.seconds


def train(name: str, option: str, folder: Path, batch_tokens: int, steps: int, d_in: int) -> Waits:
    """BatchTopK at expansion 8 in float32 for ``steps`` steps on features that are cold at the start; another epoch
    follows when one does not suffice."""
    from experiments.bench.contenders import ours as sae_step  # seconds, which only this process need spend

    peer = PEERS[name]
    cold(folder)
    step = sae_step("batchtopk")(d_in, D_SAE * d_in, K, batch_tokens, "cpu", "32")
    loader, batches = None, iter(())
    waited = counted = counted_before = 0.0
    begin = time.perf_counter()
    for number in range(SKIPPED + steps):
        if number == SKIPPED:
            begin, waited, counted, counted_before = time.perf_counter(), 0.0, 0.0, _own_count(loader)
        asked = time.perf_counter()
        batch = next(batches, None)
        if batch is None:  # the start, or the end of an epoch
            counted += _own_count(loader) - counted_before
            loader = peer.loader(folder, batch_tokens, **peer.OPTIONS[option])
            batches, counted_before = iter(loader), 0.0
            batch = next(batches)
        waited += time.perf_counter() - asked
        step(batch.reshape(-1, d_in).float())
    seconds = time.perf_counter() - begin
    counted += _own_count(loader) - counted_before
    return Waits(seconds, waited, counted if hasattr(loader, "wait_seconds") else None)


def _own_count(loader: object) -> float:
    return getattr(loader, "wait_seconds", 0.0)
