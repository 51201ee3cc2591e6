"""LMDB with one record an image, as MonoLoss keeps its features; a DataLoader asks for random keys."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from experiments.bench.feature_peers.synthetic import Features, images_a_batch, note_shape, noted_shape, shards
from experiments.bench.peers.common import load

OPTIONS = {"0 workers": {"workers": 0}, "2 workers": {"workers": 2}}


def key(image: int) -> bytes:
    """Keys of one width, so that they are appended in order."""
    return b"%09d" % image


def write(features: Features, folder: Path) -> None:
    """Raw float16 bytes under ``key(image)``; one transaction a shard, flushed at the end."""
    room = features.n_bytes + features.shape[0] * 8192 + 2**26
    with load("lmdb", "lmdb").open(str(folder), map_size=room, sync=False, metasync=False) as environment:
        image = 0
        for shard in shards(features):
            with environment.begin(write=True) as transaction:
                for patch in shard.flatten(1).view(torch.uint8).numpy():
                    transaction.put(key(image), patch.data, append=True)
                    image += 1
        environment.sync(True)
    note_shape(folder, features)


class _Images(Dataset):
    """Patch tokens [P, D] of each image, views of the memory map; collating copies them once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.shape = folder, noted_shape(folder)
        self._transaction = None  # opened by the process that reads
        warnings.filterwarnings("ignore", "The given buffer is not writable")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, image: int) -> Tensor:
        if self._transaction is None:
            options = {"readonly": True, "lock": False, "readahead": True, "meminit": False}  # as MonoLoss has them
            self._environment = load("lmdb", "lmdb").open(str(self.folder), **options)
            self._transaction = self._environment.begin(buffers=True)
        return torch.frombuffer(self._transaction.get(key(image)), dtype=torch.float16).view(self.shape[1:])


def loader(folder: Path, batch_tokens: int, workers: int = 0) -> DataLoader:
    """Batches [images, P, D] of images in random order."""
    images = _Images(folder)
    size = images_a_batch(batch_tokens, images.shape[1])
    return DataLoader(images, batch_size=size, shuffle=True, num_workers=workers)
