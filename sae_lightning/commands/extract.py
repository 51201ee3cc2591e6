"""Extract feature stores: ``python extract.py backbone=dinov2 features=[patch,cls] layers=[3,11]``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_lightning.commands.entry import command

if TYPE_CHECKING:
    from omegaconf import DictConfig


@command("extract")
def main(cfg: DictConfig) -> None:
    from sae_lightning.features.manifest import MANIFEST
    from sae_lightning.features.source import Source, extract_stores, taps_of
    from sae_lightning.features.store import FeatureStore
    from sae_lightning.rendering.table import Head, Table

    heads = [Head("store"), Head("images", ",.0f"), Head("patches", ".0f"), Head("d_in", ".0f"), Head("std", drop=1),
             Head("γ = ‖μ‖/‖σ‖", ".2f", drop=1), Head("size, MB", ",.0f")]  # fmt: skip
    rows: list[list[object]] = []
    source = Source.of(cfg)
    for split in cfg.splits:
        for folder in extract_stores(source, source.images(split), taps_of(cfg)).values():
            if not (folder / MANIFEST).is_file():
                rows.append([str(folder), "unfinished", *[None] * 5])
                continue
            store = FeatureStore.open(folder)
            size = sum(shard.bytes for shard in store.manifest.shards) / 1e6
            shape = [len(store), store.n_patches, store.d_in]
            rows.append([str(folder), *shape, float(store.std), store.manifest.severity, size])
    Table("stores", "Feature stores", heads, rows).show()
