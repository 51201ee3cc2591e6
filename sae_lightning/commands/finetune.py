"""Fine-tune classifiers with MonoLoss: ``python finetune.py -m mono_weight=0,0.03,0.05,0.07,0.1``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sae_lightning.commands.entry import command

if TYPE_CHECKING:
    from omegaconf import DictConfig


@command("finetune")
def main(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from sae_lightning.commands.hydra import point_to
    from sae_lightning.finetuning.fit import finetune

    folder = finetune(cfg)
    point_to(Path(HydraConfig.get().runtime.output_dir), [folder])
