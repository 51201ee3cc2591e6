"""Our own store, written by its writer, streamed by the datamodule, extracted by the pass that extract.py runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from experiments.bench.feature_peers import synthetic
from experiments.bench.feature_peers.synthetic import Features
from sae_lightning.backbones.backbone import Tap
from sae_lightning.data import ImageData
from sae_lightning.features.extraction import Extraction
from sae_lightning.features.extraction import extract as extract_stores
from sae_lightning.features.store import FeatureStore
from sae_lightning.features.writer import StoreWriter
from sae_lightning.training.data import FeatureDataModule

OPTIONS: dict[str, dict] = {"": {}}
PATCH = Tap("patch", 11)


def _writer(folder: Path, grid: tuple[int, int], images_per_shard: int) -> StoreWriter:
    about = {
        "data": "synthetic", "split": "train", "backbone": "none (synthetic)", "kind": "patch", "layer": PATCH.layer,
        "grid": grid, "class_names": ["unlabelled"],
    }  # fmt: skip
    return StoreWriter(folder, "0" * 64, about, images_per_shard)


def write(features: Features, folder: Path) -> None:
    """A sealed store in ``folder``, of shards of about 256 MiB."""
    count, patches, d_in = features.shape
    per_shard = max(1, synthetic.SHARD_BYTES // (patches * d_in * 2))
    writer = _writer(folder, (1, patches), per_shard)
    shard, ids, index = None, [], 0
    for block in features:
        while len(block):
            shard = shard or writer.begin(index)
            part, block = block[: per_shard - len(ids)], block[per_shard - len(ids) :]
            names = [str(index * per_shard + len(ids) + i) for i in range(len(part))]
            shard.append(part, names)
            ids += names
            if len(ids) == per_shard or index * per_shard + len(ids) == count:
                writer.finish(index, shard, ids, [0] * len(ids))
                shard, ids, index = None, [], index + 1
    writer.seal(index)


def loader(folder: Path, batch_tokens: int) -> Iterable[Tensor]:
    """The train loader of the datamodule with its default settings."""
    store = FeatureStore.open(folder)
    return FeatureDataModule(store, store, batch_tokens).train_dataloader()


class _Encoder(nn.Module):
    """What extraction asks of a backbone, around an encoder of pixels."""

    title, image_size = "vit", 224

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        from timm.data import create_transform

        self.encoder = encoder
        self.transform: Callable[[Any], Tensor] = create_transform((3, 224, 224), crop_pct=0.875)

    def check(self, tap: Tap) -> Tap:
        return tap

    def forward_features(self, pixels: Tensor, taps: Sequence[Tap]) -> dict[Tap, Tensor]:
        return dict.fromkeys(taps, self.encoder(pixels))


def extract(pictures: Path, folder: Path, encoder: nn.Module, device: str) -> None:
    """Extract the patch tokens of all pictures into a store in ``folder``, with decoding workers.

    ``encoder`` maps pixels [n, 3, 224, 224] to patch tokens [n, 196, 768] and times itself.
    """
    paths = sorted(pictures.glob("*.jpg"))
    images = ImageData(
        "pictures", "train", ["unlabelled"], [0] * len(paths), [p.name for p in paths], paths.__getitem__
    )
    settings = Extraction(batch_size=16, device=device)
    extract_stores(images, _Encoder(encoder), {PATCH: _writer(folder, (14, 14), 850)}, settings)  # type: ignore[arg-type]
