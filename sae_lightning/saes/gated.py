"""Gated SAE: one path decides which latents are active, the other how much."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sae_lightning.saes.codes import DenseCodes, SparseCodes
from sae_lightning.saes.sae import SAE, ForwardOutput, LossTerm


def gate(sae: SAE, output: ForwardOutput) -> Tensor:
    """Mean squared error of the gate's own reconstruction through the frozen decoder [Gated SAEs §3.2.1]."""
    rebuilt = output.extra["gate"].decode(sae.W_dec.detach(), sae.b_pre.detach())
    return torch.nn.functional.mse_loss(rebuilt, output.x)


class Gated(SAE):
    """z = 1[π_gate > 0] · ReLU(π_mag) [Rajamanoharan et al. 2024, Gated SAEs §3.2].

    With a = (x - b_pre) · W_encᵀ, shared by both: π_gate = a + b_gate, π_mag = exp(r_mag) · a + b_enc.
    ``sparsity`` is the L1 norm of ReLU(π_gate); the term ``gate`` reconstructs from it with the decoder frozen.
    """

    variant = "gated"
    losses: ClassVar[dict[str, LossTerm]] = {"gate": gate}

    def __init__(self, d_in: int, d_sae: int, **options: Any) -> None:
        super().__init__(d_in, d_sae, **options)
        self.b_gate = nn.Parameter(torch.zeros(d_sae))
        self.r_mag = nn.Parameter(torch.zeros(d_sae))

    def latent_parameters(self) -> dict[str, float | None]:
        return {"b_enc": 0.0, "b_gate": 0.0, "r_mag": 0.0}

    def code(self, x: Tensor) -> SparseCodes:
        return self._magnitudes(self.positive(x, self.b_gate))

    def forward_pass(self, x: Tensor) -> ForwardOutput:
        gate = self.positive(x, self.b_gate)
        codes = self._magnitudes(gate)
        return ForwardOutput(x, codes, codes.decode(self.W_dec, self.b_pre), extra={"gate": gate})

    def _magnitudes(self, gate: SparseCodes) -> SparseCodes:
        rates, bias = self.r_mag.exp(), self.b_enc - self.r_mag.exp() * self.b_gate
        if isinstance(gate, DenseCodes):
            return gate.map(lambda values, _: rates * values + bias)
        return gate.map(lambda values, latents: rates[latents] * values + bias[latents])

    def sparsity(self, output: ForwardOutput, decoder_norms: bool = True) -> Tensor:
        """L1 norm of the gate's positive part, summed over the batch."""
        return output.extra["gate"].total(self.W_dec.norm(dim=1) if decoder_norms else None)

    def candidates(self, output: ForwardOutput) -> SparseCodes:
        return output.extra["gate"]
