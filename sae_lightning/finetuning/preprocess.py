"""From pictures to an encoder's input: as it was pretrained, and with augmentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode, v2

from sae_lightning.finetuning.errors import FinetuneError

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
    if augment not in AUGMENT:
        raise FinetuneError(f"Unknown augment={augment}; choose one of {', '.join(AUGMENT)}.")
