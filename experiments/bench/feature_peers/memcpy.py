"""The yardstick of warm reading: copying as many bytes from memory to memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from experiments.bench.feature_peers.synthetic import Features, note_shape, noted_shape

AREA = 2**30
OPTIONS: dict[str, dict] = {"": {}}


def write(features: Features, folder: Path) -> None:
    """Only how much there is to copy."""
    note_shape(folder, features)


def loader(folder: Path, batch_tokens: int) -> Iterator[Tensor]:
    """Batches copied from an area of up to 1 GiB, which no processor cache holds, into one that is used again."""
    n, patches, d_in = noted_shape(folder)
    source = torch.ones(min(math.prod((n, patches, d_in)), AREA // 2), dtype=torch.float16)
    batch = torch.ones(batch_tokens * d_in, dtype=torch.float16)
    return _copies(source, batch, n * patches * d_in)


def _copies(source: Tensor, batch: Tensor, values: int) -> Iterator[Tensor]:
    at = 0
    while values:
        size = min(len(batch), values, len(source) - at)
        batch[:size].copy_(source[at : at + size])
        yield batch[:size]
        values, at = values - size, (at + size) % len(source)
