"""Which shards this process encodes: those that nobody has finished and nobody holds."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sae_lightning.features.manifest import StoreError
from sae_lightning.features.writer import StoreWriter
from sae_lightning.files import Lock


@dataclass(frozen=True)
class Claimed:
    """Consecutive images of one shard."""

    shard: int
    images: list[int]
    last: bool


class Claims:
    """A sampler of batches, shard by shard; a shard is claimed in all stores when it is its turn.

    Takes the shards of part ``part`` of ``parts`` equal ranges. ``issued`` holds the batches that were given out, in
    the order in which a loader gives them back. StoreError when the stores cut shards differently.
    """

    def __init__(
        self, n_images: int, writers: Sequence[StoreWriter], batch_size: int, part: int = 0, parts: int = 1
    ) -> None:
        self.n_images, self.batch_size = n_images, batch_size
        self.writers = sorted(writers, key=lambda writer: writer.folder)  # all claim in the same order
        sizes = sorted({writer.images_per_shard for writer in writers})
        if len(sizes) > 1:
            raise StoreError(
                f"These stores were begun with {sizes} images a shard; finish each by itself (features=…, layers=…), "
                "or delete one."
            )
        self.per_shard = sizes[0]
        self.n_shards = -(-n_images // self.per_shard)
        self.issued: deque[Claimed] = deque()
        self._range = range(self.n_shards * part // parts, self.n_shards * (part + 1) // parts)
        self._held: dict[int, list[Lock]] = {}
        self._next: int | None = None
        self._encoded: Counter[int] = Counter()  # images of shards that are held

    def images_of(self, shard: int) -> range:
        """The images of a shard."""
        return range(shard * self.per_shard, min(self.n_images, (shard + 1) * self.per_shard))

    def finished(self, shard: int) -> bool:
        """Whether every store has the shard."""
        return all(writer.has(shard) for writer in self.writers)

    def finished_by_all(self) -> set[int]:
        """The shards that every store has."""
        shards = set(range(self.n_shards))
        for writer in self.writers:
            finished = writer.finished()
            shards = shards if finished is None else shards & finished
        return shards

    def done(self) -> int:
        """Images in shards that every store has, and those that this process has encoded of others."""
        encoded = list(self._encoded.items())  # first, as another thread takes out what it has finished
        finished = self.finished_by_all()
        return sum(len(self.images_of(s)) for s in finished) + sum(n for s, n in encoded if s not in finished)

    def encoded(self, batch: Claimed) -> None:
        """Count the images of a batch that is encoded."""
        self._encoded[batch.shard] += len(batch.images)

    def all_finished(self) -> bool:
        """Whether every store has every shard."""
        return len(self.finished_by_all()) == self.n_shards

    def ready(self) -> bool:
        """Whether there is a shard to encode now; it is then held."""
        if self._next is None:
            self._next = self._claim_one()
        return self._next is not None

    def __iter__(self) -> Iterator[list[int]]:
        while self.ready():
            shard, self._next = self._next, None
            assert shard is not None
            images = list(self.images_of(shard))
            for i in range(0, len(images), self.batch_size):
                batch = Claimed(shard, images[i : i + self.batch_size], i + self.batch_size >= len(images))
                self.issued.append(batch)
                yield batch.images

    def _claim_one(self) -> int | None:
        finished = self.finished_by_all()
        for shard in self._range:
            if shard in self._held or shard in finished:
                continue
            locks: list[Lock] = []
            for writer in self.writers:
                lock = writer.claim(shard)
                if lock is None:
                    break
                locks.append(lock)
            else:
                if not self.finished(shard):  # another process may have finished it just before
                    self._held[shard] = locks
                    return shard
            for lock in locks:
                lock.release()
        return None

    def release(self, shard: int) -> None:
        """Let go of a shard, finished or not."""
        self._encoded.pop(shard, None)
        for lock in self._held.pop(shard, []):
            lock.release()

    def release_all(self) -> None:
        """Let go of everything."""
        for shard in list(self._held):
            self.release(shard)
        self.issued.clear()
        self._next = None
