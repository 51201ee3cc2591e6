"""Sparse autoencoders as plain ``nn.Module``s, without Hydra or Lightning; each variant's file registers it."""

from sae_lightning.registry import discover
from sae_lightning.saes.artefact import VARIANTS, ArtefactError
from sae_lightning.saes.batchtopk import BatchTopK
from sae_lightning.saes.codes import DenseCodes, SparseCodes
from sae_lightning.saes.gated import Gated
from sae_lightning.saes.jumprelu import JumpReLU
from sae_lightning.saes.matryoshka import Matryoshka, MatryoshkaTopK
from sae_lightning.saes.msae import MSAE
from sae_lightning.saes.relu import ReLU
from sae_lightning.saes.sae import SAE, ForwardOutput, Normalizer
from sae_lightning.saes.topk import TopK

discover(__name__)

__all__ = [
    "MSAE", "SAE", "VARIANTS", "ArtefactError", "BatchTopK", "DenseCodes", "ForwardOutput", "Gated", "JumpReLU",
    "Matryoshka", "MatryoshkaTopK", "Normalizer", "ReLU", "SparseCodes", "TopK",
]  # fmt: skip
