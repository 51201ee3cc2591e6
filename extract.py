"""Extract feature stores: ``python extract.py backbone=dinov2 [splits=[test]]``."""

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from sae_lightning.features.extract import ensure_store


@hydra.main(version_base="1.3", config_path="conf", config_name="extract")
def main(cfg: DictConfig) -> None:
    table = Table(title="Feature stores")
    for column in ("store", "images", "patches", "d_in", "std", "γ = ‖μ‖/‖σ‖", "size"):
        table.add_column(column, justify="left" if column == "store" else "right", overflow="fold")
    for split in cfg.splits:
        store = ensure_store(cfg, split)
        size = sum(shard.bytes for shard in store.manifest.shards)
        table.add_row(
            str(store.folder), f"{len(store):,}", str(store.n_patches), str(store.d_in), f"{store.std:.3f}",
            f"{store.manifest.severity:.2f}", f"{size / 1e6:,.0f} MB",
        )  # fmt: skip
    Console(width=max(120, Console().width)).print(table)


if __name__ == "__main__":
    main()
