"""The order of an epoch: a pure function of seed, epoch and step, the same for every number of ranks.

Rows (tokens, or whole images) are cut into blocks of consecutive ones. An epoch permutes the blocks, cuts the permuted
sequence into *lanes* of equal length, and each lane into *windows*; a window's rows are permuted once more and dealt to
its batches. Every lane gives an equal part of every global batch; rank r of w serves lanes r, r + w, … So an epoch is
an exact permutation but for the remainder that fills no batch, ranks never overlap, all take the same number of
steps, and the batch of any step can be found without reading those before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Order:
    """How ``n_rows`` rows become batches of ``batch_size`` over all ranks.

    ``block`` rows are read together; at most ``window`` steps share a shuffle. Raises ValueError where lanes do not
    divide the batch or there are too few rows for one.
    """

    n_rows: int
    batch_size: int
    block: int
    window: int
    lanes: int = 8
    seed: int = 42

    def __post_init__(self) -> None:
        if self.batch_size % self.lanes:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of the {self.lanes} lanes of the stream; change it "
                "or stream.lanes."
            )
        if self.steps < 1:
            raise ValueError(
                f"A batch of {self.batch_size} does not fit the {self.n_rows} rows of the store; lower batch_size."
            )

    @property
    def steps(self) -> int:
        """Batches an epoch; what is left over is dropped, another part each epoch."""
        return self.n_rows // self.batch_size

    @property
    def windows(self) -> int:
        """Windows an epoch, of equal length but for one step."""
        return -(-self.steps // self.window)

    @property
    def per_lane(self) -> int:
        """Rows of a batch that come from one lane."""
        return self.batch_size // self.lanes

    def lanes_of(self, rank: int, world: int) -> list[int]:
        """The lanes that ``rank`` of ``world`` serves; ValueError when they cannot be shared equally."""
        if self.lanes % world:
            raise ValueError(f"{world} ranks cannot share {self.lanes} lanes; set stream.lanes to a multiple of them.")
        return list(range(rank, self.lanes, world))

    def first_step(self, window: int) -> int:
        """The step with which a window begins."""
        return window * self.steps // self.windows

    def steps_of(self, window: int) -> int:
        """Steps of a window, at most ``self.window``."""
        return self.first_step(window + 1) - self.first_step(window)

    def window_of(self, step: int) -> int:
        """The window that a step lies in."""
        return ((step + 1) * self.windows - 1) // self.steps

    def segments(self, epoch: int, lane: int, window: int) -> list[tuple[int, int]]:
        """(first row, rows) of the runs of consecutive rows that fill the lane's part of the window."""
        order, ends = _permuted_blocks(self, epoch)
        start = (lane * self.steps + self.first_step(window)) * self.per_lane
        stop = start + self.steps_of(window) * self.per_lane
        out = []
        for i in range(int(np.searchsorted(ends, start, side="right")), len(order)):
            first = ends[i - 1] if i else 0  # of this block, in the permuted sequence
            if first >= stop:
                break
            low, high = max(start, first), min(stop, ends[i])
            out.append((int(order[i] * self.block + low - first), int(high - low)))
        return out

    def places(self, epoch: int, lane: int, window: int, lanes: int, position: int) -> np.ndarray:
        """Where the lane's rows, in the order of ``segments``, go in the rank's window [steps, lanes, per_lane].

        ``lanes`` is how many the rank serves, ``position`` which of them this is. int64 [rows].
        """
        rows = self.steps_of(window) * self.per_lane
        drawn = np.random.default_rng([self.seed, epoch, lane, window]).permutation(rows)
        step, within = np.divmod(drawn, self.per_lane)
        return (step * lanes + position) * self.per_lane + within


@lru_cache(maxsize=4)
def _permuted_blocks(order: Order, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks in the epoch's order and, for each, where it ends in the permuted sequence of rows."""
    n_blocks = -(-order.n_rows // order.block)
    permuted = np.random.default_rng([order.seed, epoch]).permutation(n_blocks)
    sizes = np.full(n_blocks, order.block, dtype=np.int64)
    sizes[permuted == n_blocks - 1] = order.n_rows - (n_blocks - 1) * order.block
    return permuted, np.cumsum(sizes)
