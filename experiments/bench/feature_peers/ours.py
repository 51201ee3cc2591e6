"""Our own store and datamodule. To be written when sae_lightning.features has its new interface."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from experiments.bench.feature_peers.synthetic import Features

OPTIONS: dict[str, dict] = {"": {}}


def write(features: Features, folder: Path) -> None:
    """A sealed store in ``folder``."""
    raise ImportError("The benchmark's adapter for sae_lightning.features is not written yet.")


def loader(folder: Path, batch_tokens: int) -> Iterable[Tensor]:
    """The train loader of the datamodule; its ``wait_seconds``, where it has one, is compared with the loop's own."""
    raise ImportError("The benchmark's adapter for sae_lightning.features is not written yet.")


def extract(pictures: Path, folder: Path, encoder: nn.Module, device: str) -> None:
    """Extract the patch tokens of all pictures into a store in ``folder``, with decoding workers.

    ``encoder`` maps pixels [n, 3, 224, 224] to patch tokens [n, 196, 768] and times itself.
    """
    raise ImportError("The benchmark's adapter for sae_lightning.features is not written yet.")
