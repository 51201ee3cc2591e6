"""BatchTopK of which a part stays as random as it started: what is the rest of the training worth?

The three baselines of Korznikov et al. 2026 (arXiv 2602.14111, "Sanity checks for sparse autoencoders"), which on
language models come close to SAEs that are trained whole.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from sae_lightning.saes.batchtopk import BatchTopK

NEAR = 0.8  # the least cosine of a decoder row with its start [Korznikov et al. 2026]


class FrozenDecoder(BatchTopK):
    """Decoder rows stay their random start; encoder and biases learn."""

    variant = "frozen_decoder"
    frozen: ClassVar[tuple[str, ...]] = ("W_dec",)
    restarts = False


class FrozenEncoder(BatchTopK):
    """Encoder rows and their biases stay their start, so that what latents fire on is random; the decoder and ``b_pre``
    learn."""

    variant = "frozen_encoder"
    frozen: ClassVar[tuple[str, ...]] = ("W_enc", "b_enc")
    restarts = False


class SoftFrozenDecoder(BatchTopK):
    """All learns, but a decoder row stays within cosine 0.8 of its random start ``W_start`` [d_sae, d_in].

    After each step a row beyond it goes to the nearest unit vector at that cosine.
    """

    variant = "soft_frozen_decoder"
    restarts = False
    W_start: Tensor

    def __init__(self, d_in: int, d_sae: int, k: float, **options: Any) -> None:
        super().__init__(d_in, d_sae, k=k, **options)
        self.register_buffer("W_start", self.W_dec.detach().clone())

    @torch.no_grad()
    def after_step(self) -> None:
        cosines = (self.W_dec * self.W_start).sum(1)
        far = (cosines < NEAR).nonzero().squeeze(1)
        start = self.W_start[far]
        aside = torch.nn.functional.normalize(self.W_dec[far] - cosines[far, None] * start, dim=1)
        self.W_dec[far] = NEAR * start + (1 - NEAR**2) ** 0.5 * aside
