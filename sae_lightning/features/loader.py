"""The stream of batches: windows of an epoch are read by threads, each row straight to its place in a batch."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from sae_lightning.features.order import Order
from sae_lightning.features.store import FeatureStore
from sae_lightning.registry import one_of


class Buffer:
    """``nbytes`` of (pinned, where that helps) memory, given out in slices.

    Whoever fills it, and every slice, owes it one return; when all have come back it may be used again.
    """

    def __init__(self, nbytes: int, pinned: bool, returns: queue.SimpleQueue[Buffer]) -> None:
        # NumPy asks for huge pages, whose first touch costs half
        self.memory: np.ndarray = (
            torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy() if pinned else np.empty(nbytes, np.uint8)
        )
        self.pinned = pinned
        self.owed, self.returned = 0, 0
        self._returns = returns

    def give_back(self) -> None:
        """One return. Safe in a finaliser, which may run anywhere: a SimpleQueue may be put to within its own put."""
        self._returns.put(self)

    def slice(self, start: int, stop: int) -> Tensor:
        """Bytes ``start`` to ``stop`` as a tensor; its return comes when it and all views of it are gone."""
        part = self.memory[start:stop]
        self.owed += 1
        weakref.finalize(part, self.give_back).atexit = False
        return torch.from_numpy(part)


class BufferPool:
    """Two buffers: batches are taken from one while the other is filled.

    Another is made only while the consumer waits for a window and still holds batches of both. One thread fills at a
    time. ``device`` is the GPU that batches in pinned memory are copied to.
    """

    def __init__(self, nbytes: int, pinned: bool, device: torch.device | None = None) -> None:
        self.nbytes, self.pinned, self.device = nbytes, pinned, device
        self._returns: queue.SimpleQueue[Buffer] = queue.SimpleQueue()
        self._free: list[Buffer] = []
        self._out = 0

    def take(self, stopped: threading.Event, starving: threading.Event) -> Buffer | None:
        """A buffer to fill, owed once; None when ``stopped``. ``starving`` says that the consumer waits for one."""
        self._collect(block=False)
        starved = 0  # looks in a row; the consumer lets go of its last batch only with the next one in hand
        while not self._free and self._out >= 2 and starved < 2:
            if stopped.is_set():
                return None
            self._collect(block=True)
            starved = starved + 1 if starving.is_set() else 0
        if not self._free:
            self._free.append(Buffer(self.nbytes, self.pinned, self._returns))
        elif self.pinned:
            # copies may still be on their way; the device is named, for a new thread's own is always GPU 0
            torch.cuda.synchronize(self.device)
        buffer = self._free.pop()
        self._out += 1
        buffer.owed, buffer.returned = 1, 0
        return buffer

    def _collect(self, block: bool) -> None:
        try:
            while True:
                buffer = self._returns.get(block, timeout=0.02)
                buffer.returned += 1
                if buffer.returned == buffer.owed:
                    self._out -= 1
                    if len(self._free) < 2:
                        self._free.append(buffer)
                    block = False
        except queue.Empty:
            return


UNITS = ("tokens", "images")

TASK = 4 << 20  # bytes that a reading thread takes on at a time

Job = tuple[int, int, np.ndarray]  # first row, rows, where each goes


class FeatureLoader:
    """Batches of raw features of one epoch after another, shuffled; see ``Order`` for how.

    ``unit="tokens"`` gives [batch_size / world, d_in], ``"images"`` [batch_size / world, P, d_in], in the store's
    dtype.
    ``buffer_mb`` (MiB, over all ranks) bounds the memory: two windows of half of it each, which a batch is a view of.
    ``block_mb`` are read at a time, by ``readers`` threads. Each ``iter`` is one epoch, which then counts up;
    ``seek`` chooses the next. Deterministic in seed, epoch and the settings of the order, whatever the number of
    ranks and readers. ``device`` is where batches go, by default the present GPU, if there is one; on the way to a GPU
    they lie in ``pinned`` memory, unless told otherwise. Raises ValueError for settings that do not fit the store.
    """

    def __init__(
        self, store: FeatureStore, batch_size: int, *, seed: int = 42, unit: str = "tokens", buffer_mb: float = 1024,
        block_mb: float = 4, lanes: int = 8, readers: int = 4, rank: int = 0, world: int = 1,
        pinned: bool | None = None, device: torch.device | None = None,
    ) -> None:  # fmt: skip
        one_of(unit, UNITS, "stream.unit")
        if readers < 1:
            raise ValueError(f"stream.readers={readers} must be at least 1.")
        self.store, self.unit, self.readers, self.world = store, unit, readers, world
        self.tokens = store.n_patches if unit == "images" else 1  # a row
        self.row_bytes = self.tokens * store.d_in * 2
        n_rows = store.n_tokens // self.tokens
        batch_bytes = batch_size * self.row_bytes
        window = int(buffer_mb * 2**20 / 2) // batch_bytes
        if window < 1:
            raise ValueError(
                f"stream.buffer_mb={buffer_mb} does not hold two batches of {batch_bytes / 2**20:.1f} MiB; raise it or "
                "lower batch_size."
            )
        image = store.n_patches // self.tokens  # rows of an image
        block = max(1, int(block_mb * 2**20) // (image * self.row_bytes))
        block = max(1, min(block, len(store) // (4 * lanes)))  # small stores: smaller blocks
        window = min(window, max(1, n_rows // batch_size))
        self.order = Order(n_rows, batch_size, block * image, window, lanes, seed)
        self.lanes = self.order.lanes_of(rank, world)
        rows = self.order.per_lane * len(self.lanes)
        self.shape = (rows, store.d_in) if unit == "tokens" else (rows, store.n_patches, store.d_in)
        self._batch_bytes = rows * self.row_bytes
        if device is None and pinned is not False and torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
        on_gpu = device is not None and device.type == "cuda"
        self._pool = BufferPool(window * self._batch_bytes, on_gpu if pinned is None else pinned, device)
        self._next = (0, 0)  # epoch, step
        self.wait_seconds = 0.0

    def __len__(self) -> int:
        """Steps of an epoch, the same for every rank and epoch."""
        return self.order.steps

    def seek(self, epoch: int, step: int = 0) -> None:
        """Let the next iteration begin at batch ``step`` of ``epoch``."""
        self._next = (epoch + step // len(self), step % len(self))

    def __iter__(self) -> Iterator[Tensor]:
        # decided at the first batch, not before: Lightning makes the iterator before it restores a resumed run
        epoch, first = self._next
        self._next = (epoch + 1, 0)
        ready: queue.Queue = queue.Queue(1)
        stopped, starving = threading.Event(), threading.Event()
        filled: deque[Buffer] = deque()  # and not yet given back
        arguments = (epoch, self.order.window_of(first), ready, filled, stopped, starving)
        thread = threading.Thread(target=self._fill, args=arguments, daemon=True)
        thread.start()
        try:
            for window in range(self.order.window_of(first), self.order.windows):
                buffer = self._wait(ready, starving)
                skip = max(0, first - self.order.first_step(window))
                for step in range(skip, self.order.steps_of(window)):
                    yield self._batch(buffer, step)
                filled.popleft().give_back()
        finally:
            stopped.set()
            thread.join()
            for buffer in filled:
                buffer.give_back()

    def _wait(self, ready: queue.Queue, starving: threading.Event) -> Buffer:
        start = time.perf_counter()
        starving.set()
        item = ready.get()
        starving.clear()
        self.wait_seconds += time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        return item

    def _batch(self, buffer: Buffer, step: int) -> Tensor:
        raw = buffer.slice(step * self._batch_bytes, (step + 1) * self._batch_bytes)
        return raw.view(self.store.dtype).view(self.shape)

    def _fill(
        self, epoch: int, first: int, ready: queue.Queue, filled: deque[Buffer], stopped: threading.Event,
        starving: threading.Event,
    ) -> None:  # fmt: skip
        try:
            with ThreadPoolExecutor(self.readers, "reader") as pool:
                for window in range(first, self.order.windows):
                    buffer = self._pool.take(stopped, starving)
                    if buffer is None:
                        return
                    filled.append(buffer)
                    self._read(pool, epoch, window, buffer, stopped)
                    _put(ready, buffer, stopped)
        except BaseException as error:
            _put(ready, error, stopped)

    def _read(
        self, pool: ThreadPoolExecutor, epoch: int, window: int, buffer: Buffer, stopped: threading.Event
    ) -> None:
        """Fill ``buffer`` with a window, or stop in the middle."""
        out = buffer.memory.reshape(-1, self.row_bytes)

        def plan(position: int) -> list[list[Job]]:
            lane = self.lanes[position]
            places = self.order.places(epoch, lane, window, len(self.lanes), position)
            tasks: list[list[Job]] = [[]]
            done = size = 0
            for start, rows in self.order.segments(epoch, lane, window):
                if size * self.row_bytes > TASK:
                    tasks.append([])
                    size = 0
                tasks[-1].append((start, rows, places[done : done + rows]))
                done, size = done + rows, size + rows
            return tasks

        def work(task: list[Job]) -> None:
            for start, rows, places in task:
                if stopped.is_set():
                    return
                self.store.read(start, rows, out, places, self.tokens)

        plans = pool.map(plan, range(len(self.lanes)))
        for future in [pool.submit(work, task) for tasks in plans for task in tasks]:
            future.result()


def _put(ready: queue.Queue, item: object, stopped: threading.Event) -> None:
    while not stopped.is_set():
        try:
            ready.put(item, timeout=0.1)
            return
        except queue.Full:
            continue
