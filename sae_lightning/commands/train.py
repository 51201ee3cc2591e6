"""Train sparse autoencoders: ``python train.py -m sae=batchtopk backbone=dinov2,mae expansion=8,16,32``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sae_lightning.commands.entry import command

if TYPE_CHECKING:
    from omegaconf import DictConfig


@command("train", "config")
def main(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from sae_lightning.commands.hydra import point_to
    from sae_lightning.features.source import looking_once
    from sae_lightning.runs.identity import run_name
    from sae_lightning.runs.state import is_a_try
    from sae_lightning.training.fit import train
    from sae_lightning.training.packed import members_of, train_packed

    output = Path(HydraConfig.get().runtime.output_dir)
    members = members_of(cfg)
    with looking_once():
        kept = [member for member in members if not is_a_try(member)]
        point_to(output, [Path(member.paths.runs) / run_name(member) for member in kept])
    if len(members) == 1:
        train(members[0])
    else:
        train_packed(members)
