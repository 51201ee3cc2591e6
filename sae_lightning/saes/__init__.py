"""Sparse autoencoders as plain ``nn.Module``s, usable without Hydra or Lightning."""

from sae_lightning.saes.artefact import ArtefactError
from sae_lightning.saes.batchtopk import BatchTopK
from sae_lightning.saes.codes import DenseCodes, SparseCodes
from sae_lightning.saes.gated import Gated
from sae_lightning.saes.jumprelu import JumpReLU
from sae_lightning.saes.matryoshka import Matryoshka, MatryoshkaTopK
from sae_lightning.saes.msae import MSAE
from sae_lightning.saes.relu import ReLU
from sae_lightning.saes.sae import SAE, Normalizer, Pass
from sae_lightning.saes.topk import TopK

VARIANTS: dict[str, type[SAE]] = {
    cls.variant: cls for cls in (ReLU, TopK, BatchTopK, JumpReLU, Gated, Matryoshka, MatryoshkaTopK, MSAE)
}

__all__ = [
    "MSAE", "SAE", "VARIANTS", "ArtefactError", "BatchTopK", "DenseCodes", "Gated", "JumpReLU", "Matryoshka",
    "MatryoshkaTopK", "Normalizer", "Pass", "ReLU", "SparseCodes", "TopK",
]  # fmt: skip
