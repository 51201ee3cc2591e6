"""One stream of batches for several trainings in one process, which take turns."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sae_lightning.features.loader import FeatureLoader

NOT_THERE = -1  # the position of a member that is still being set up


class StreamStoppedError(RuntimeError):
    """Training was asked to stop between two batches."""


class SharedStream:
    """Deals the batches of one ``FeatureLoader`` to ``members`` trainings, each in a thread of its own.

    At most ``workers`` of them work at a time; who works, works until it asks for its next batch. Next comes the one
    that is furthest back, then the first in the order of their indices, and nobody is more than ``ahead`` batches
    before the last: so a batch is read once and held only briefly, and with one worker every process of a DDP job
    takes the same turns. Trainings that begin at different batches (resumed ones, say) wait for those behind.
    """

    def __init__(self, members: int, workers: int = 1, ahead: int = 2) -> None:
        self.members, self.workers, self.ahead = members, workers, 0 if workers == 1 else ahead
        self.on_batch: Callable[[int, int], None] = lambda position, steps: None  # called for each new batch
        self._turn = threading.Condition()
        self._reading = threading.Lock()
        self._at: dict[int, int] = dict.fromkeys(range(members), NOT_THERE)  # of those that have not left
        self._waiting: set[int] = set()
        self._working = 0
        self._batches: dict[int, Tensor] = {}
        self._loader: FeatureLoader | None = None
        self._source: Iterator[Tensor] | None = None
        self._next = 0  # position of the batch that comes out of _source
        self._broken: BaseException | None = None

    # --- turns --------------------------------------------------------------------------------------
    def enter(self, member: int) -> None:
        """Wait for the turn to be set up. Call first in the member's thread."""
        self._wait_for_turn(member)

    def leave(self, member: int) -> None:
        """Give up the turn for good: training has ended or failed."""
        with self._turn:
            self._working -= 1
            del self._at[member]
            self._turn.notify_all()

    def stop(self, error: BaseException | None = None) -> None:
        """Let every member's next request for a batch raise ``error``, by default StreamStoppedError."""
        with self._turn:
            self._broken = self._broken or error or StreamStoppedError("Training was stopped between two batches.")
            self._turn.notify_all()

    def take(self, member: int, loader: FeatureLoader, position: int, device: torch.device) -> Tensor:
        """The batch at ``position`` (steps from the beginning of training), when it is ``member``'s turn again.

        It is read through ``loader`` and brought to ``device`` at the first request, whoever's that is.
        """
        with self._turn:
            self._working -= 1
            self._at[member] = position
            self._turn.notify_all()
        self._wait_for_turn(member)
        with self._reading:
            try:
                return self._read(loader, position, device)
            except BaseException as error:
                self.stop(error)
                raise

    def _wait_for_turn(self, member: int) -> None:
        with self._turn:
            self._waiting.add(member)
            self._turn.wait_for(lambda: self._broken is not None or self._may_work(member))
            self._waiting.discard(member)
            self._working += 1  # also when stopped: it leaves as one that works
            self._turn.notify_all()
            if self._broken is not None:
                raise self._broken

    def _may_work(self, member: int) -> bool:
        if self._working >= self.workers:
            return False
        position, last = self._at[member], min(self._at.values())
        if position != NOT_THERE and (last == NOT_THERE or position > last + self.ahead):
            return False
        return member == min(self._waiting, key=lambda m: (self._at[m], m))

    # --- batches ------------------------------------------------------------------------------------
    def _read(self, loader: FeatureLoader, position: int, device: torch.device) -> Tensor:
        with self._turn:
            first = min(self._at.values())
        for old in [p for p in self._batches if p < first]:
            del self._batches[old]
        if self._loader is None:
            self._loader, self._next = loader, first
            loader.seek(0, first)
        while self._next <= position:
            self._batches[self._next] = self._following().to(device, non_blocking=True)
            self.on_batch(self._next, len(self._loader))
            self._next += 1
        return self._batches[position]

    def _following(self) -> Tensor:
        assert self._loader is not None
        while True:
            if self._source is None:
                self._source = iter(self._loader)  # the next epoch
            batch = next(self._source, None)
            if batch is not None:
                return batch
            self._source = None

    @property
    def wait_seconds(self) -> float:
        """Time that members have waited for batches to be read."""
        return 0.0 if self._loader is None else self._loader.wait_seconds


class StreamMember:
    """A member's place in a ``SharedStream``: makes its loader, and keeps the time that it works."""

    def __init__(self, stream: SharedStream, index: int) -> None:
        self.stream, self.index = stream, index
        self.resting = 0.0  # seconds spent waiting for its turn

    def clock(self) -> float:
        """Seconds that pass only while the member works (or waits for a batch to be read)."""
        return time.monotonic() - self.resting

    def take(self, loader: FeatureLoader, position: int, device: torch.device) -> Tensor:
        """``SharedStream.take``."""
        start, waited = time.monotonic(), self.stream.wait_seconds
        try:
            return self.stream.take(self.index, loader, position, device)
        finally:
            self.resting += time.monotonic() - start - (self.stream.wait_seconds - waited)


class SharedLoader:
    """What a ``FeatureLoader`` is to a trainer, its batches taken from a ``SharedStream``."""

    def __init__(self, loader: FeatureLoader, member: StreamMember, device: torch.device) -> None:
        self.loader, self.member, self.device = loader, member, device
        self._next = (0, 0)

    def __len__(self) -> int:
        return len(self.loader)

    def seek(self, epoch: int, step: int = 0) -> None:
        """Let the next iteration begin at batch ``step`` of ``epoch``."""
        self._next = (epoch + step // len(self), step % len(self))

    def __iter__(self) -> Iterator[Tensor]:
        epoch, first = self._next
        self._next = (epoch + 1, 0)
        for step in range(first, len(self)):
            yield self.member.take(self.loader, epoch * len(self) + step, self.device)

    @property
    def wait_seconds(self) -> float:
        """Time that the stream has waited for batches to be read."""
        return self.member.stream.wait_seconds
