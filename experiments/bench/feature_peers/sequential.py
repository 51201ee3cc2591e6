"""The yardstick of cold reading: one thread that reads every file from start to end in large pieces, and drops them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from experiments.bench.feature_peers.synthetic import Features, shards
from experiments.bench.pagecache import files_in

PIECE = 16 * 2**20
OPTIONS: dict[str, dict] = {"": {}}


def write(features: Features, folder: Path) -> None:
    """Plain safetensors shards, for when there is no store of ours to read."""
    for number, shard in enumerate(shards(features)):
        save_file({"patch": shard.contiguous()}, folder / f"shard-{number:05d}.safetensors")


def loader(folder: Path, batch_tokens: int) -> Iterator[Tensor]:
    """Pieces of up to 16 MiB in one buffer that is used again and again."""
    buffer = torch.empty(PIECE // 2, dtype=torch.float16)
    view = memoryview(buffer.view(torch.uint8).numpy())
    for path in files_in(folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            offset = 0
            while (got := os.preadv(descriptor, [view], offset)) > 0:
                offset += got
                yield buffer[: got // 2]
        finally:
            os.close(descriptor)
