"""Memory for windows of batches, used again once nobody holds a batch of it."""

from __future__ import annotations

import queue
import threading
import weakref

import numpy as np
import torch
from torch import Tensor


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
