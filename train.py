"""Train sparse autoencoders: ``python train.py -m sae=batchtopk backbone=dinov2,mae expansion=8,16,32``."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sae_lightning.training.closing_table import POINTER
from sae_lightning.training.run import train


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    folder = train(cfg)
    (Path(HydraConfig.get().runtime.output_dir) / POINTER).write_text(str(folder.resolve()))


if __name__ == "__main__":
    main()
