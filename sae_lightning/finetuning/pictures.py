"""Labelled pictures as the classifier's input, and the order in which training sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from sae_lightning.backbones.weights import fixed_seed
from sae_lightning.data import ImageData
from sae_lightning.finetuning.errors import FinetuneError

Transform = Callable[[Image.Image], Tensor]
Sample = tuple[Tensor, int, int]


class Pictures(Dataset):
    """Image i as (pixels [3, H, W], label, i)."""

    def __init__(self, images: ImageData, transform: Transform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return self.transform(self.images[index]), int(self.images.labels[index]), index


class AugmentedPictures(Dataset):
    """Item (epoch, i): image i with chance drawn from seed, epoch and i alone.

    So pictures do not depend on ranks, workers, or on where a resumed run began.
    """

    def __init__(self, images: ImageData, transform: Transform, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        epoch, index = item
        picture = self.images[index]
        with fixed_seed(int(np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)[0])):
            return self.transform(picture), int(self.images.labels[index]), index


class EpochBatches(Sampler):
    """Batches of (epoch, image) for one rank: each ``iter`` is one epoch, which then counts up.

    An epoch is a permutation of ``n`` images cut into global batches of ``batch_size``, the rest left out; the ranks
    divide each batch. ``seek`` chooses the next batch. FinetuneError when the batch does not fit images or ranks.
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if batch_size > n:
            raise FinetuneError(f"batch_size={batch_size} exceeds the {n} images of the train split; lower it.")
        if batch_size % world:
            raise FinetuneError(f"batch_size={batch_size} must be a multiple of the {world} devices that share it.")
        self.n, self.batch_size, self.seed, self.rank, self.world = n, batch_size, seed, rank, world
        self._next = (0, 0)

    def __len__(self) -> int:
        """Steps of an epoch."""
        return self.n // self.batch_size

    def seek(self, epoch: int, step: int) -> None:
        """Let the next iteration begin at batch ``step`` of ``epoch``."""
        self._next = (epoch, step)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, first = self._next
        self._next = (epoch + 1, 0)
        order: Any = np.random.default_rng([self.seed, epoch]).permutation(self.n)
        for step in range(first, len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield [(epoch, i) for i in batch[self.rank :: self.world].tolist()]
