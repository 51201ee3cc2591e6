"""Extract feature stores: ``python extract.py backbone=dinov2 features=[patch,cls] layers=[3,11]``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_lightning.commands.entry import command

if TYPE_CHECKING:
    from omegaconf import DictConfig


@command("extract")
def main(cfg: DictConfig) -> None:
    from rich.console import Console
    from rich.table import Table

    from sae_lightning.features.manifest import MANIFEST
    from sae_lightning.features.source import Source, extract_stores, taps_of
    from sae_lightning.features.store import FeatureStore

    table = Table(title="Feature stores")
    for column in ("store", "images", "patches", "d_in", "std", "γ = ‖μ‖/‖σ‖", "size"):
        table.add_column(column, justify="left" if column == "store" else "right", overflow="fold")
    source = Source.of(cfg)
    for split in cfg.splits:
        for folder in extract_stores(source, source.images(split), taps_of(cfg)).values():
            if not (folder / MANIFEST).is_file():
                table.add_row(str(folder), "unfinished", "", "", "", "", "")
                continue
            store = FeatureStore.open(folder)
            size = sum(shard.bytes for shard in store.manifest.shards)
            table.add_row(
                str(folder), f"{len(store):,}", str(store.n_patches), str(store.d_in), f"{store.std:.3f}",
                f"{store.manifest.severity:.2f}", f"{size / 1e6:,.0f} MB",
            )  # fmt: skip
    Console(width=max(120, Console().width)).print(table)
