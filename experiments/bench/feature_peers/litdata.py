"""litdata: chunks of 64 MB as its ``optimize`` writes them, one sample an image, read from a local folder."""

from __future__ import annotations

from pathlib import Path

from torch.utils.data import DataLoader

from experiments.bench.feature_peers.synthetic import Features, images_a_batch, note_shape, noted_shape
from experiments.bench.peers.common import load

OPTIONS = {"0 workers": {"workers": 0}, "2 workers": {"workers": 2}}


def write(features: Features, folder: Path) -> None:
    """What ``optimize`` does in its worker processes, done in this one."""
    load("litdata", "litdata")
    cache = load("litdata.streaming", "litdata").Cache(str(folder), chunk_bytes="64MB")
    image = 0
    for block in features:
        for patch in block:
            cache[image] = patch
            image += 1
    cache.done()
    cache.merge()
    note_shape(folder, features)


def loader(folder: Path, batch_tokens: int, workers: int = 0) -> DataLoader:
    """Batches [images, P, D]; chunks and the images in each are shuffled.

    Local chunks are mapped in place. Samples are decoded one by one (``batch_decode=0``), the fastest setting here.
    """
    litdata = load("litdata", "litdata")
    images = litdata.StreamingDataset(str(folder), shuffle=True, batch_decode=0)
    size = images_a_batch(batch_tokens, noted_shape(folder)[1])
    return litdata.StreamingDataLoader(images, batch_size=size, num_workers=workers)
