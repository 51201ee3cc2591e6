"""Which split an image of a stream belongs to, decided when it comes by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from sae_lightning.data.errors import DataError


@dataclass(frozen=True)
class StreamCut:
    """Keeps ``split`` of a stream from which one image in ``block`` of each class goes to each of ``held_out``.

    The images of a class within a shard are counted in blocks of ``block``; from each block one place for
    each held-out split is drawn by (seed, shard, class, block). So a split is a share of every class, needs
    neither a second pass nor memory, and does not depend on how the shards are divided among readers.
    """

    split: str
    held_out: tuple[str, ...]
    block: int
    seed: int

    @classmethod
    def of(cls, held_out: Mapping[str, float], split: str, seed: int) -> StreamCut:
        """The cut for equal shares ``held_out``; DataError unless each leaves something for the others."""
        share = max(held_out.values())
        block = round(1 / share) if share > 0 else 0
        if block <= len(held_out):
            raise DataError(
                f"data.held_out={share:g} cannot be cut from a stream for {' and '.join(held_out)}; "
                f"take more than 0 and at most {1 / (len(held_out) + 1):.2g}."
            )
        return cls(split, tuple(held_out), block, seed)

    def keeps(self, label: str, shard: int, count: int) -> bool:
        """Whether the ``count``-th image (from 0) of class ``label`` in ``shard`` is in the split."""
        number, place = divmod(count, self.block)
        drawn = self._drawn(f"{self.seed}/{shard}/{number}/{label}")
        owner = self.held_out[drawn.index(place)] if place in drawn else "train"
        return owner == self.split

    def _drawn(self, key: str) -> list[int]:
        """A different place in the block for each held-out split, all equally likely."""
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        draws = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(len(self.held_out))]
        places: list[int] = []
        for i, draw in enumerate(draws):
            place = draw % (self.block - i)
            for taken in sorted(places):
                place += place >= taken
            places.append(place)
        return places
