"""The LightningDataModule: augmented pictures with their similarity embeddings, resumable at any step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision import transforms
from torchvision.transforms import InterpolationMode, v2

from sae_lightning.backbones.settings import fixed_seed
from sae_lightning.data import ImageData
from sae_lightning.data.loader import PictureLoader, pixel_bytes
from sae_lightning.distributed.limits import cores
from sae_lightning.distributed.ranks import rank, world_size
from sae_lightning.features.source import Source
from sae_lightning.features.store import FeatureStore
from sae_lightning.registry import one_of
from sae_lightning.training.data import next_batch


class FinetuneError(ValueError):
    """A model, layer, data set or similarity store with which fine-tuning cannot work; the message says what to do."""


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


AUGMENT = ("crop", "resized_crop", "none")

SHIFT = 8  # pictures are padded by this part of an edge before they are cropped: 4 of 32 pixels


@dataclass(frozen=True)
class Preprocess:
    """``image_size`` pixels an edge; ``resize`` is the shorter edge before the centre is cut out, or None to squeeze.

    ``interpolation`` is torchvision's name; ``mean`` and ``std`` are of the three channels.
    """

    image_size: int
    resize: int | None
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, transform: Any, image_size: int) -> Preprocess:
        """Read off the steps of a backbone's ``transform``: Resize, CenterCrop, ToTensor and Normalize.

        FinetuneError when it is an image processor whose steps are not known.
        """
        if not hasattr(transform, "transforms"):
            raise FinetuneError(
                f"Pictures are prepared by {type(transform.processor).__name__}, which augmentation cannot follow; "
                "choose another backbone."
            )
        resize: int | None = None
        interpolation = InterpolationMode.BICUBIC.value
        mean: tuple[float, ...] = (0.0, 0.0, 0.0)
        std: tuple[float, ...] = (1.0, 1.0, 1.0)
        for step in transform.transforms:
            if isinstance(step, transforms.Resize):
                interpolation = InterpolationMode(step.interpolation).value
                size = [step.size] if isinstance(step.size, int) else list(step.size)
                resize = int(size[0]) if len(size) == 1 else None
            elif isinstance(step, transforms.Normalize):
                mean, std = (tuple(float(v) for v in torch.as_tensor(x)) for x in (step.mean, step.std))
        return cls(image_size, resize, interpolation, mean, std)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Preprocess:
        return cls(**settings | {name: tuple(settings[name]) for name in ("mean", "std")})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def evaluation(self, augment: str) -> Callable[[Image.Image], Tensor]:
        """Without chance. Where training crops pictures as they are, the whole picture is scaled, nothing cut off."""
        whole = augment == "crop" or self.resize is None
        size = [self.image_size, self.image_size] if whole else [self.resize]
        steps = [v2.Resize(size, InterpolationMode(self.interpolation)), v2.CenterCrop(self.image_size)]
        return v2.Compose([*steps, *self._tensor()])

    def training(self, augment: str) -> Callable[[Image.Image], Tensor]:
        """With chance, from torch's global generator: ``crop`` shifts by up to an eighth and flips (usual for CIFAR),
        ``resized_crop`` cuts out 8 to 100 % and flips (usual for ImageNet), ``none`` is ``evaluation``."""
        check_augment(augment)
        if augment == "none":
            return self.evaluation(augment)
        size, filled = [self.image_size, self.image_size], InterpolationMode(self.interpolation)
        first: list[nn.Module] = [Shift(), v2.Resize(size, filled)]
        if augment == "resized_crop":
            first = [v2.RandomResizedCrop(size, interpolation=filled)]
        return v2.Compose([*first, v2.RandomHorizontalFlip(), *self._tensor()])

    def _tensor(self) -> list[nn.Module]:
        return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(self.mean), list(self.std))]


class Shift(nn.Module):
    """Pads a picture with black by an eighth of each edge and crops its own size out at random."""

    def forward(self, picture: Image.Image) -> Image.Image:
        width, height = picture.size
        x, y = (max(1, round(edge / SHIFT)) for edge in (width, height))
        left, top = (int(torch.randint(2 * pad + 1, ())) for pad in (x, y))
        return v2.functional.crop(v2.functional.pad(picture, [x, y]), top, left, height, width)


def check_augment(augment: str) -> None:
    """FinetuneError for an augmentation that does not exist."""
    one_of(augment, AUGMENT, "augment", FinetuneError)


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


def similarity_store(cfg: DictConfig, split: str) -> FeatureStore:
    """The store of ``cfg.features`` of ``split`` by the encoder ``cfg.similarity``, extracted now if it is missing.

    Or the folder ``cfg.similarity_store.<split>``, made by whatever encoder. Raises FinetuneError for features of
    more than one vector an image, and what ``Source.store`` raises.
    """
    given = cfg.similarity_store.get(split)
    store = Source.of(cfg, "similarity").store(split) if given is None else FeatureStore.open(Path(given))
    if store.n_patches != 1:
        raise FinetuneError(
            f"{store.folder} holds {store.n_patches} vectors an image ({store.kind}); similarity needs one: set "
            "features=embedding, pooled or cls."
        )
    return store


def align(store: FeatureStore, images: ImageData) -> Tensor:
    """Embeddings [n, d] of ``images`` in their order, in the store's type; FinetuneError names an image without one."""
    rows, missing = store.find(images.image_ids)
    if missing:
        raise FinetuneError(
            f"{store.folder} holds no embedding of {len(missing)} of the {len(images)} {images.split} images of "
            f"'{images.name}', '{missing[0]}' among them; name the store of these images, or delete it and run again "
            "so that it is extracted anew."
        )
    return store.features(rows).flatten(1)
