"""The thread that takes encoded batches to their shards while the encoder goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sae_lightning.backbones import Tap
from sae_lightning.features.shard import ShardFile
from sae_lightning.features.writer import StoreWriter

DEPTH = 4  # batches in flight


@dataclass
class Encoded:
    """The features of consecutive images of one shard, and what is known of the images.

    ``left_out`` has the ids of images that could not be read. ``last`` ends the shard; ``state`` is then where a stream
    of images stands.
    """

    shard: int
    last: bool
    image_ids: list[str]
    labels: list
    captions: list[str] | None
    features: dict[Tap, Tensor]
    left_out: list[str] = field(default_factory=list)
    state: dict | None = None


class Sink:
    """``put`` batches in order; after the last of a shard it is finished and ``release(shard)`` is called.

    An error in the thread is raised by the next ``put`` or by ``close``.
    """

    def __init__(self, writers: Mapping[Tap, StoreWriter], release: Callable[[int], None]) -> None:
        self.writers, self.release = writers, release
        self._open: dict[Tap, ShardFile] = {}
        self._parts: list[Encoded] = []  # of the open shard, without their features
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._queue: queue.Queue = queue.Queue(DEPTH)
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, batch: Encoded) -> None:
        """Hand over the next batch."""
        ready = None
        if self._stream is not None and any(x.is_cuda for x in batch.features.values()):
            ready = torch.cuda.Event()
            ready.record()
        self._hand((batch, ready))

    def close(self) -> None:
        """Wait until everything is written."""
        self._hand(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the thread; a shard that is not finished is removed. Harmless after ``close``."""
        self._stopped.set()
        self._thread.join()
        for shard in self._open.values():
            shard.abort()
        self._open = {}

    def _hand(self, item: object) -> None:
        while True:
            if self._error is not None:
                raise self._error
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                try:
                    item = self._queue.get(timeout=0.1)
                except queue.Empty:
                    continue
                if item is None:
                    return
                self._take(*item)
        except BaseException as error:
            self._error = error

    def _take(self, batch: Encoded, ready: torch.cuda.Event | None) -> None:
        features, batch.features = batch.features, {}
        self._parts.append(batch)
        with torch.cuda.stream(self._stream) if ready is not None else nullcontext():
            if ready is not None:
                assert self._stream is not None
                self._stream.wait_event(ready)
            for tap, x in features.items():
                if ready is not None:
                    x.record_stream(self._stream)  # type: ignore[arg-type]
                if not self.writers[tap].has(batch.shard):
                    if tap not in self._open:
                        self._open[tap] = self.writers[tap].begin(batch.shard)
                    self._open[tap].append(x if x.ndim == 3 else x[:, None], batch.image_ids)
        if batch.last:
            self._finish(batch)

    def _finish(self, last: Encoded) -> None:
        parts, self._parts = self._parts, []
        ids = [x for part in parts for x in part.image_ids]
        labels = [x for part in parts for x in part.labels]
        captions = [x for part in parts for x in part.captions or []]
        left_out = [x for part in parts for x in part.left_out]
        for tap, writer in self.writers.items():
            text = captions if tap.kind == "text" else None
            if tap in self._open or not writer.has(last.shard):  # nothing is open where no image could be read
                writer.finish(last.shard, self._open.pop(tap, None), ids, labels, text, left_out, last.state)
        self.release(last.shard)
