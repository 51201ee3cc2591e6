"""Train sparse autoencoders: ``python train.py -m sae=batchtopk backbone=dinov2,mae expansion=8,16,32``."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sae_lightning.commands.start import started
from sae_lightning.training.closing_table import point_to
from sae_lightning.training.identity import run_name
from sae_lightning.training.packed import members_of, train_packed
from sae_lightning.training.run import train


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    output = Path(HydraConfig.get().runtime.output_dir)
    members = members_of(started(cfg))
    point_to(output, [Path(member.paths.runs) / run_name(member) for member in members])
    if len(members) == 1:
        train(members[0])
    else:
        train_packed(members)


if __name__ == "__main__":
    main()
