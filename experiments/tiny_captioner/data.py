"""CIFAR-10 with sentences and with the tokens of the captioner's vision tower, computed once and kept in a folder."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from experiments.tiny_backbones.cifar import normalise
from experiments.tiny_captioner.model import PATCHES, captioner
from experiments.tiny_captioner.pixels import Measured, measure
from experiments.tiny_captioner.sentences import sentence
from sae_lightning.backbones.tiny import WIDTH

DRAWS = 4  # sentences a picture; epoch e learns draw e mod DRAWS
FEATURE_BLOCK = -2  # hidden states the projector takes


@dataclass(frozen=True)
class Pictures:
    """``images`` [N, 3, 32, 32] uint8, ``labels`` [N] and what was measured in each picture."""

    images: Tensor
    labels: np.ndarray
    measured: list[Measured]

    def __len__(self) -> int:
        return len(self.labels)


def pictures(parquet: Path, limit: int | None = None) -> Pictures:
    """The first ``limit`` images of a parquet file of the Hugging Face image + label schema."""
    table = pq.read_table(parquet, columns=["image", "label"]).slice(0, limit)
    cells = table["image"].to_pylist()
    images = [
        np.asarray(Image.open(io.BytesIO(c["bytes"])).convert("RGB")) for c in tqdm(cells, "Decoding", leave=False)
    ]
    measured = [measure(image) for image in tqdm(images, "Measuring", leave=False)]
    return Pictures(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), table["label"].to_numpy(), measured)


def sentences(of: Pictures, seed: int = 42) -> list[list[str]]:
    """``DRAWS`` lists of one sentence a picture."""
    rng = np.random.default_rng(seed)
    return [[sentence(int(y), m, rng) for y, m in zip(of.labels, of.measured, strict=True)] for _ in range(DRAWS)]


@torch.no_grad()
def vision_tokens(tower: nn.Module, images: Tensor, path: Path) -> np.ndarray:
    """Patch tokens [N, 64, 128] float16 that the projector takes, mapped from ``path``."""
    if not path.exists():
        partial = path.with_suffix(".partial.npy")
        shape = (len(images), PATCHES, WIDTH)
        found = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
        for at in tqdm(range(0, len(images), 250), "Vision tower", unit="batch"):
            states = tower(normalise(images[at : at + 250]), output_hidden_states=True).hidden_states
            found[at : at + 250] = states[FEATURE_BLOCK][:, 1:].numpy()
        found.flush()
        partial.rename(path)
    return np.load(path, mmap_mode="r")


def prepared(parquet: Path, folder: Path) -> tuple[list[list[str]], np.ndarray]:
    """Sentences and vision tokens of ``parquet``; kept in ``folder`` for the next time."""
    texts, tokens = folder / "sentences.json", folder / "tokens.npy"
    if not (texts.exists() and tokens.exists()):
        found = pictures(parquet)
        texts.write_text(json.dumps(sentences(found)), encoding="utf-8")
        vision_tokens(captioner([])[0].eval().model.vision_tower, found.images, tokens)
    return json.loads(texts.read_text(encoding="utf-8")), np.load(tokens, mmap_mode="r")
