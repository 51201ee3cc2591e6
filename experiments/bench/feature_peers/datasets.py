"""Hugging Face datasets: an Arrow data set with one row an image, format torch, read through an indices mapping.

Two orders: ``images`` shuffles single images, ``blocks`` shuffles blocks of 14 consecutive images (4 MiB), which cold
disks like better. An ``IterableDataset`` with a shuffle buffer, and a DataLoader with workers over either kind, were
tried and are several times slower here: the buffer goes row by row, workers send batches through shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from experiments.bench.feature_peers.synthetic import Features, images_a_batch, note_shape, noted_shape, shards
from experiments.bench.peers.common import load

OPTIONS = {"images": {"block": 1}, "blocks": {"block": 14}}
ROWS = 64  # of a record batch


def write(features: Features, folder: Path) -> None:
    """``shard-*.arrow`` in the stream format that the library maps into memory; a row is an image, flat."""
    datasets = load("datasets", "datasets")
    _, patches, d_in = features.shape
    kind = datasets.Features({"patch": datasets.List(datasets.Value("float16"), length=patches * d_in)})
    for number, shard in enumerate(shards(features)):
        values = pa.array(shard.flatten().numpy())
        table = pa.table([pa.FixedSizeListArray.from_arrays(values, patches * d_in)], schema=kind.arrow_schema)
        with pa.ipc.new_stream(str(folder / f"shard-{number:05d}.arrow"), table.schema) as stream:
            stream.write_table(table, max_chunksize=ROWS)
    note_shape(folder, features)


def loader(folder: Path, batch_tokens: int, block: int = 1) -> Iterator[Tensor]:
    """Batches [images, P, D]."""
    datasets = load("datasets", "datasets")
    parts = [datasets.Dataset.from_file(str(path)) for path in sorted(folder.glob("*.arrow"))]
    images = datasets.concatenate_datasets(parts).with_format("torch", dtype=torch.float16)
    n, patches, d_in = noted_shape(folder)
    blocks = np.random.default_rng(0).permutation(-(-n // block))
    order = (blocks[:, None] * block + np.arange(block)).reshape(-1)
    images = images.select(order[order < n])
    batches = images.iter(images_a_batch(batch_tokens, patches))
    return (batch["patch"].view(-1, patches, d_in) for batch in batches)
