"""Features that no one extracted: random numbers in which every token carries its own number, so that a test can tell
whether a loader has delivered each of them once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SHARD_BYTES = 256 * 2**20
DIGIT = 2048  # float16 holds the integers up to here exactly


class Features:
    """Iterates over blocks [≤64, P, D] float16 of ``n_images`` images; the same blocks each time."""

    def __init__(self, n_images: int, n_patches: int = 196, d_in: int = 768, block: int = 64) -> None:
        self.shape = (n_images, n_patches, d_in)
        self.block = min(block, n_images)

    @classmethod
    def of_size(cls, gigabytes: float) -> Features:
        """As many images of 196 tokens of 768 as fill ``gigabytes`` (10**9 bytes)."""
        return cls(max(1, round(gigabytes * 1e9 / (196 * 768 * 2))))

    @property
    def n_bytes(self) -> int:
        """Bytes of all features."""
        n, patches, d_in = self.shape
        return n * patches * d_in * 2

    def __iter__(self) -> Iterator[Tensor]:
        n, patches, d_in = self.shape
        rng = np.random.default_rng(0)
        base = rng.standard_normal((self.block * patches, d_in), np.float32).astype(np.float16).view(np.int16)
        for first in range(0, n, self.block):
            images = min(self.block, n - first)
            mantissas = rng.integers(0, 1024, d_in, np.int16)  # no two blocks alike
            tokens = (base[: images * patches] ^ mantissas).view(np.float16)
            number = np.arange(first * patches, (first + images) * patches)
            for place in range(3):
                tokens[:, place] = number // DIGIT**place % DIGIT
            yield torch.from_numpy(tokens.reshape(images, patches, d_in))


def token_numbers(features: Tensor) -> Tensor:
    """The numbers of tokens [..., D], flat, int64."""
    digits = features.reshape(-1, features.shape[-1])[:, :3].long()
    return digits @ torch.tensor([1, DIGIT, DIGIT**2])


def shards(features: Features, shard_bytes: int | None = None) -> Iterator[Tensor]:
    """The features in pieces [n, P, D] of at most ``shard_bytes`` (256 MiB), whole images; valid until the next one."""
    n, patches, d_in = features.shape
    size = max(1, (shard_bytes or SHARD_BYTES) // (patches * d_in * 2))
    shard, filled = torch.empty(min(size, n), patches, d_in, dtype=torch.float16), 0
    for block in features:
        while len(block):
            taken = min(len(block), len(shard) - filled)
            shard[filled : filled + taken] = block[:taken]
            filled, block = filled + taken, block[taken:]
            if filled == len(shard):
                yield shard
                filled = 0
    if filled:
        yield shard[:filled]


def note_shape(folder: Path, features: Features) -> None:
    """Keep the shape beside data whose format does not hold it."""
    (folder / "shape.json").write_text(json.dumps(features.shape), encoding="utf-8")


def noted_shape(folder: Path) -> tuple[int, int, int]:
    """What ``note_shape`` kept: images, patches, width."""
    n, patches, d_in = json.loads((folder / "shape.json").read_text(encoding="utf-8"))
    return n, patches, d_in


def images_a_batch(batch_tokens: int, n_patches: int) -> int:
    """Images whose tokens come closest to ``batch_tokens``, for libraries that deliver whole images."""
    return max(1, round(batch_tokens / n_patches))
