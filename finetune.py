"""Fine-tune classifiers with MonoLoss: ``python finetune.py -m mono_weight=0,0.03,0.05,0.07,0.1``."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sae_lightning.commands.start import started
from sae_lightning.finetuning.run import finetune
from sae_lightning.training.closing_table import point_to


@hydra.main(version_base="1.3", config_path="conf", config_name="finetune")
def main(cfg: DictConfig) -> None:
    folder = finetune(started(cfg))
    point_to(Path(HydraConfig.get().runtime.output_dir), [folder])


if __name__ == "__main__":
    main()
