"""ReLU SAE: every positive pre-activation is active; sparsity comes from the L1 term of its loss."""

from __future__ import annotations

from torch import Tensor

from sae_lightning.saes.codes import SparseCodes
from sae_lightning.saes.sae import SAE, ForwardOutput


class ReLU(SAE):
    """z = max(0, pre_acts) [Bricken et al. 2023]."""

    variant = "relu"

    def code(self, x: Tensor) -> SparseCodes:
        return self.positive(x)

    def candidates(self, output: ForwardOutput) -> SparseCodes:
        return output.codes
