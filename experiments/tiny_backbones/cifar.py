"""CIFAR-10 in memory and its augmentations, batched so that one core keeps up with the tiny ViTs."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from experiments.demo_data.captions import caption
from sae_lightning.backbones.tiny import PIXEL_MEAN, PIXEL_STD
from sae_lightning.data.bundled import CIFAR10_CLASSES as CLASS_NAMES


@dataclass
class Cifar:
    """Images [N, 3, 32, 32] (uint8), labels [N] (int64) and one caption an image."""

    images: Tensor
    labels: Tensor
    captions: list[str]

    def __len__(self) -> int:
        return len(self.labels)


def load(parquet: Path, seed: int = 42) -> Cifar:
    """Decode a parquet file of the Hugging Face image + label schema."""
    table = pq.read_table(parquet, columns=["image", "label"])
    rng = np.random.default_rng(seed)
    images, captions = [], []
    labels = table["label"].to_numpy()
    for cell, label in zip(table["image"].to_pylist(), labels, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"))
        images.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
        captions.append(caption(pixels, CLASS_NAMES[label], rng))
    return Cifar(torch.stack(images), torch.from_numpy(labels.astype(np.int64)), captions)


def normalise(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to float, zero mean and unit deviation on CIFAR-10."""
    mean = torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(PIXEL_STD).view(1, 3, 1, 1)
    return (images.float() / 255.0 - mean) / std


def random_resized_crop(images: Tensor, size: int, scale: tuple[float, float]) -> Tensor:
    """Crop each of float images [B, 3, H, W] at its own place and area share, flip half, resize to ``size``."""
    count = len(images)
    area = torch.empty(count).uniform_(*scale)
    ratio = torch.empty(count).uniform_(np.log(3 / 4), np.log(4 / 3)).exp()
    width, height = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
    flip = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width * flip, height
    theta[:, 0, 2] = (2 * torch.rand(count) - 1) * (1 - width)
    theta[:, 1, 2] = (2 * torch.rand(count) - 1) * (1 - height)
    grid = F.affine_grid(theta, [count, 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def colour_jitter(images: Tensor, strength: float, grey: float = 0.0) -> Tensor:
    """Random brightness, contrast and saturation of normalised float images; a share ``grey`` loses colour."""

    def factor() -> Tensor:
        return torch.empty(len(images), 1, 1, 1).uniform_(1 - strength, 1 + strength)

    images = images + (factor() - 1)
    middle = images.mean((1, 2, 3), keepdim=True)
    images = (images - middle) * factor() + middle
    luminance = images.mean(1, keepdim=True)
    saturation = torch.where(torch.rand(len(images), 1, 1, 1) < grey, torch.zeros(1), factor())
    return luminance + (images - luminance) * saturation
