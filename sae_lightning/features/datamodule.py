"""Streaming patch tokens of a store into training, in an order that does not depend on the number of ranks.

An epoch's blocks of consecutive images are permuted and dealt to a fixed number of *lanes*. Each lane
keeps its own shuffle buffer and gives an equal part of every global batch; a rank serves the lanes
``rank, rank + world, …``. So the global batches are the same for every number of ranks that divides the
lanes, ranks never overlap, and all take the same number of steps.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from sae_lightning.features.store import FeatureStore
from sae_lightning.saes.ranks import rank, world_size


class TokenStream(IterableDataset):
    """Batches of raw patch tokens [batch_size / world, d_in] of one epoch, shuffled.

    Every token comes at most once an epoch; what does not fill a batch in every lane is dropped (at most
    one batch and one block a lane). Deterministic in ``seed`` and ``epoch``. Raises ValueError when the
    batch, the lanes and the ranks do not divide each other, or the store is smaller than one batch.
    """

    def __init__(
        self,
        store: FeatureStore,
        batch_size: int,
        seed: int = 42,
        lanes: int = 8,
        block_images: int = 16,
        buffer_tokens: int = 262_144,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if lanes % world:
            raise ValueError(f"{world} ranks cannot share {lanes} lanes; set the datamodule's lanes to a multiple.")
        if batch_size % lanes:
            raise ValueError(f"batch_size={batch_size} must be a multiple of the {lanes} lanes of the stream.")
        self.store, self.seed, self.lanes = store, seed, lanes
        self.block_images = max(1, min(block_images, len(store) // (4 * lanes)))  # small stores: smaller blocks
        self.rank, self.world = rank, world
        self.per_lane = batch_size // lanes
        self.buffer = max(buffer_tokens // lanes, 2 * self.per_lane)
        self.n_blocks = -(-len(store) // self.block_images)
        self.epoch = 0
        self._steps = min(self._lane_tokens(lane, self._order(0)) for lane in range(lanes)) // self.per_lane
        if self._steps < 1:
            raise ValueError(
                f"A batch of {batch_size} tokens does not fit {store.n_tokens} tokens in {lanes} lanes of "
                f"{self.block_images}-image blocks; lower batch_size."
            )

    def __len__(self) -> int:
        """Steps an epoch, the same for every rank and epoch."""
        return self._steps

    def _order(self, epoch: int) -> np.ndarray:
        order = np.random.default_rng([self.seed, epoch]).permutation(self.n_blocks)
        # the short last block stays in place, so that no epoch has fewer steps than another
        if len(self.store) % self.block_images:
            at = np.flatnonzero(order == self.n_blocks - 1)[0]
            order[at], order[-1] = order[-1], self.n_blocks - 1
        return order

    def _lane_tokens(self, lane: int, order: np.ndarray) -> int:
        sizes = np.minimum(self.block_images, len(self.store) - order[lane :: self.lanes] * self.block_images)
        return int(sizes.sum()) * self.store.n_patches

    def __iter__(self) -> Iterator[Tensor]:
        lanes = [self._lane(lane) for lane in range(self.rank, self.lanes, self.world)]
        for _ in range(self._steps):
            yield torch.cat([next(lane) for lane in lanes])

    def _lane(self, lane: int) -> Iterator[Tensor]:
        """Parts of ``per_lane`` tokens: the buffer is filled, shuffled, and half used before it is filled again."""
        generator = torch.Generator().manual_seed(
            int(np.random.default_rng([self.seed, self.epoch, lane]).integers(2**62))
        )
        blocks = iter(self._order(self.epoch)[lane :: self.lanes])
        pool = torch.empty(0, self.store.d_in, dtype=torch.float16)
        exhausted = False
        while True:
            fresh, total = [pool], len(pool)
            while total < self.buffer and not exhausted:
                block = next(blocks, None)
                if block is None:
                    exhausted = True
                    break
                start = int(block) * self.block_images
                tokens = self.store.patches(slice(start, start + self.block_images)).reshape(-1, self.store.d_in)
                fresh.append(tokens)
                total += len(tokens)
            pool = torch.cat(fresh)
            pool = pool[torch.randperm(len(pool), generator=generator)]
            used = 0
            while used + self.per_lane <= len(pool) and (exhausted or used <= len(pool) // 2):
                yield pool[used : used + self.per_lane]
                used += self.per_lane
            pool = pool[used:]
            if exhausted and len(pool) < self.per_lane:
                return


class Prefetched:
    """An iterable read ahead by one thread; ``wait_seconds`` adds up the time its consumer was kept waiting."""

    def __init__(self, source: TokenStream, depth: int = 4) -> None:
        self.source, self.depth = source, depth
        self.wait_seconds = 0.0

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Tensor]:
        ready: queue.Queue = queue.Queue(self.depth)
        stopped = threading.Event()

        def put(item: object) -> bool:
            while not stopped.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def read() -> None:
            try:
                for batch in self.source:
                    if not put(batch):
                        return
                put(None)
            except Exception as error:
                put(error)

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        try:
            while True:
                start = time.perf_counter()
                item = ready.get()
                self.wait_seconds += time.perf_counter() - start
                if item is None:
                    return
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()


class _Epochs(IterableDataset):
    """The prefetched stream as a dataset, told the epoch before each pass."""

    def __init__(self, data: FeatureDataModule, stream: TokenStream) -> None:
        self.data, self.stream = data, stream
        self.prefetched = Prefetched(stream)

    def __len__(self) -> int:
        return len(self.stream)

    def __iter__(self) -> Iterator[Tensor]:
        # at the first batch, not before: Lightning makes the iterator before it restores the epoch of a resumed run
        self.stream.epoch = self.data.epoch
        yield from self.prefetched


class FeatureDataModule(L.LightningDataModule):
    """Raw fp16 tokens [B, d_in] of ``train``, shuffled, and of ``val``, in order.

    ``batch_size`` counts tokens a step over all ranks. In validation every token is seen once by one
    rank; ranks may take different numbers of steps, which sums over ranks do not mind.
    """

    def __init__(
        self, train: FeatureStore, val: FeatureStore, batch_size: int, seed: int = 42, lanes: int = 8,
        block_images: int = 16, buffer_tokens: int = 262_144,
    ) -> None:  # fmt: skip
        super().__init__()
        self.train, self.val, self.batch_size = train, val, batch_size
        self.options = {"seed": seed, "lanes": lanes, "block_images": block_images, "buffer_tokens": buffer_tokens}
        self._epochs: _Epochs | None = None

    @property
    def epoch(self) -> int:
        """The trainer's epoch, 0 without a trainer."""
        return self.trainer.current_epoch if self.trainer is not None else 0

    @property
    def wait_seconds(self) -> float:
        """Time that training has waited for batches."""
        return self._epochs.prefetched.wait_seconds if self._epochs is not None else 0.0

    def train_dataloader(self) -> DataLoader:
        stream = TokenStream(self.train, self.batch_size, rank=rank(), world=world_size(), **self.options)
        self._epochs = _Epochs(self, stream)
        return DataLoader(self._epochs, batch_size=None, pin_memory=torch.cuda.is_available())

    def val_dataloader(self) -> DataLoader:
        world = world_size()
        return DataLoader(InOrder(self.val, self.batch_size // world, rank(), world), batch_size=None)


class InOrder(IterableDataset):
    """About ``tokens`` raw features [n, d_in] a batch in the store's order, whole images, dealt to the ranks."""

    def __init__(self, store: FeatureStore, tokens: int, rank: int = 0, world: int = 1) -> None:
        self.store, self.images = store, max(1, tokens // store.n_patches)
        self.starts = range(rank * self.images, len(store), world * self.images)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[Tensor]:
        for start in self.starts:
            yield self.store.patches(slice(start, start + self.images)).reshape(-1, self.store.d_in)
