"""Extraction of patch features from pictures, and the share of its time that the encoder is at work."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from experiments.bench.feature_peers import ours

MODEL = "vit_base_patch16_224"
BATCH = 16


def make_pictures(folder: Path, count: int) -> None:
    """``count`` JPEGs of about 500 x 375 pixels and 50 to 100 KB: coloured shapes under noise."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        width, height = int(rng.integers(440, 560)), int(rng.integers(330, 420))
        picture = Image.new("RGB", (width, height), tuple(map(int, rng.integers(0, 256, 3))))
        draw = ImageDraw.Draw(picture)
        for _ in range(12):
            x, y, w, h = (int(v) for v in rng.integers(0, (width, height, width // 2, height // 2)))
            shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
            shape((x, y, x + w, y + h), fill=tuple(map(int, rng.integers(0, 256, 3))))
        noisy = np.asarray(picture, np.int16) + rng.normal(0, 14, (height, width, 3)).astype(np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05d}.jpg", quality=85)


class Clocked(nn.Module):
    """An encoder that adds up the time of its forward passes; on CUDA that of the device."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.cpu_seconds, self.images = encoder, 0.0, 0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def forward(self, pixels: Tensor) -> Tensor:
        """Patch tokens [n, 196, 768] of pixels [n, 3, 224, 224]."""
        self.images += len(pixels)
        if pixels.is_cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            tokens = self.encoder.forward_features(pixels)[:, 1:]
            end.record()
            self.events.append((begin, end))
            return tokens
        start = time.perf_counter()
        tokens = self.encoder.forward_features(pixels)[:, 1:]
        self.cpu_seconds += time.perf_counter() - start
        return tokens

    @property
    def seconds(self) -> float:
        """Seconds spent in forward passes."""
        return self.cpu_seconds + sum(begin.elapsed_time(end) for begin, end in self.events) / 1000


@dataclass(frozen=True)
class Busy:
    """Seconds of an extraction, those inside the encoder, and the pictures done."""

    seconds: float
    encoder: float
    images: int

    @property
    def share(self) -> float:
        """Share of the time that the encoder worked."""
        return self.encoder / self.seconds


def naive(pictures: Path, folder: Path, encoder: nn.Module, device: str) -> None:
    """What a first script does: decode a batch, run the encoder, save the features, one after the other."""
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.Resize(256), v2.CenterCrop(224), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )  # fmt: skip
    paths = sorted(pictures.glob("*.jpg"))
    for first in range(0, len(paths), BATCH):
        pixels = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths[first : first + BATCH]])
        tokens = encoder(pixels.to(device))
        torch.save(tokens.half().cpu(), folder / f"{first:06d}.pt")


EXTRACTIONS: dict[str, Callable[[Path, Path, nn.Module, str], None]] = {"ours": ours.extract, "naive loop": naive}


def extract(name: str, pictures: Path, folder: Path, device: str) -> Busy:
    """One extraction into the empty ``folder``; a first forward pass is made before the clock starts."""
    import timm  # seconds, which only this process need spend

    encoder = Clocked(timm.create_model(MODEL, pretrained=False, num_classes=0)).eval().to(device)
    with torch.inference_mode():
        encoder(torch.zeros(2, 3, 224, 224, device=device))
        if device != "cpu":
            torch.cuda.synchronize()
        encoder.cpu_seconds, encoder.images, encoder.events = 0.0, 0, []
        start = time.perf_counter()
        EXTRACTIONS[name](pictures, folder, encoder, device)
        seconds = time.perf_counter() - start
    return Busy(seconds, encoder.seconds, encoder.images)
