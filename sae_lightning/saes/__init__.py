"""Sparse autoencoders as plain ``nn.Module``s, usable without Hydra or Lightning."""

from sae_lightning.saes.artefact import ArtefactError
from sae_lightning.saes.base import SAE, Pass
from sae_lightning.saes.batchtopk import BatchTopK
from sae_lightning.saes.codes import SparseCodes
from sae_lightning.saes.normalizer import Normalizer
from sae_lightning.saes.relu import ReLU
from sae_lightning.saes.topk import TopK

VARIANTS: dict[str, type[SAE]] = {cls.variant: cls for cls in (ReLU, TopK, BatchTopK)}

__all__ = ["SAE", "VARIANTS", "ArtefactError", "BatchTopK", "Normalizer", "Pass", "ReLU", "SparseCodes", "TopK"]
