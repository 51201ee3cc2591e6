"""Training SAEs with Lightning."""

from sae_lightning.training.module import SAEModule

__all__ = ["SAEModule"]
