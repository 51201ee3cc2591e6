"""The LightningDataModule: augmented pictures with their similarity embeddings, resumable at any step."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from sae_lightning.data import ImageData
from sae_lightning.data.loader import PictureLoader, pixel_bytes
from sae_lightning.features.datamodule import next_batch
from sae_lightning.finetuning.pictures import AugmentedPictures, EpochBatches, Pictures
from sae_lightning.finetuning.preprocess import Preprocess
from sae_lightning.limits import cores
from sae_lightning.saes.ranks import rank, world_size

SMALL = 64  # pixels an edge up to which decoding costs less than starting a process


class PictureDataModule(L.LightningDataModule):
    """Train batches (pixels [b, 3, H, W], labels [b]) and, given ``embeddings`` [n, d] of the train images, also
    these [b, d], the same for every augmentation of an image; validation batches (pixels, labels).

    ``batch_size`` counts images a step over all ranks. The state, which a checkpoint holds, is the epoch and step of
    the next batch.
    """

    def __init__(
        self,
        train: ImageData,
        val: ImageData | None,
        preprocess: Preprocess,
        batch_size: int,
        augment: str = "crop",
        embeddings: Tensor | None = None,
        seed: int = 42,
        num_workers: int | None = None,
    ) -> None:
        super().__init__()
        self.train, self.val, self.preprocess, self.augment = train, val, preprocess, augment
        self.batch_size, self.embeddings, self.seed, self.num_workers = batch_size, embeddings, seed, num_workers
        self._start: tuple[int, int] | None = None

    def train_dataloader(self) -> DataLoader:
        batches = EpochBatches(len(self.train), self.batch_size, self.seed, rank(), world_size())
        if self._start is not None:
            batches.seek(*self._start)
        pictures = AugmentedPictures(self.train, self.preprocess.training(self.augment), self.seed)
        return self._loader(pictures, batch_sampler=batches)

    def val_dataloader(self) -> Any:
        """Every image once, dealt to the ranks; nothing without a validation split."""
        if self.val is None:
            return []
        pictures = Pictures(self.val, self.preprocess.evaluation(self.augment))
        mine = Subset(pictures, range(rank(), len(pictures), world_size()))
        return self._loader(mine, batch_size=max(1, self.batch_size // world_size()))

    def _loader(self, pictures: Dataset, **batches: Any) -> DataLoader:
        size, ranks = self.preprocess.image_size, world_size()
        count = workers(size, self.num_workers, ranks)
        return PictureLoader(
            pictures, pixel_bytes(size, max(1, self.batch_size // ranks)), count, persistent_workers=count > 0,
            pin_memory=torch.cuda.is_available(), **batches,
        )  # fmt: skip

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        pixels, labels, index = batch
        if self.embeddings is None or self.trainer is None or not self.trainer.training:
            return pixels, labels
        return pixels, labels, self.embeddings[index].float()

    # --- where training stands ------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Epoch and step after the last batch that was trained on."""
        if self.trainer is None:
            return {}
        epoch, step = next_batch(self.trainer)
        return {"epoch": epoch, "step": step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        if state:
            self._start = (state["epoch"], state["step"])


def workers(image_size: int, asked: int | None, ranks: int = 1) -> int:
    """Processes that decode for each rank: as asked, else none for tiny pictures, else the cores less one a rank."""
    if asked is not None:
        return asked
    return 0 if image_size <= SMALL else max(1, cores() // ranks - 1)
