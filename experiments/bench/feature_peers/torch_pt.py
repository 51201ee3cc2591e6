"""PyTorch alone: shards saved with torch.save, loaded whole by a DataLoader, shards and the tokens in each shuffled."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from experiments.bench.feature_peers.synthetic import Features, shards

OPTIONS = {"0 workers": {"workers": 0}, "2 workers": {"workers": 2}}


def write(features: Features, folder: Path) -> None:
    """``shard-*.pt`` with tokens [N, D] each."""
    for number, shard in enumerate(shards(features)):
        torch.save(shard.flatten(0, 1).clone(), folder / f"shard-{number:05d}.pt")


class _Shards(IterableDataset):
    """Batches of the tokens of one shard after another; what does not fill a batch goes with the next shard."""

    def __init__(self, paths: list[Path], batch_tokens: int) -> None:
        self.paths, self.batch_tokens = paths, batch_tokens

    def __iter__(self) -> Iterator[Tensor]:
        worker, rest = get_worker_info(), None
        order = random.Random(0).sample(self.paths, len(self.paths))
        for path in order[worker.id :: worker.num_workers] if worker else order:
            tokens = torch.load(path, weights_only=True)
            shuffled = torch.randperm(len(tokens))
            first = self.batch_tokens - (0 if rest is None else len(rest))
            for part in (shuffled[:first], *shuffled[first:].split(self.batch_tokens)):
                batch = tokens[part] if rest is None else torch.cat([rest, tokens[part]])
                rest = batch if len(batch) < self.batch_tokens else None
                if rest is None:
                    yield batch
        if rest is not None and len(rest):
            yield rest


def loader(folder: Path, batch_tokens: int, workers: int = 0) -> DataLoader:
    """Batches [batch_tokens, D], shuffled within a shard of 256 MiB."""
    return DataLoader(_Shards(sorted(folder.glob("*.pt")), batch_tokens), batch_size=None, num_workers=workers)
