"""MSAE: TopK at many k at once, each level reconstructing by itself."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from sae_lightning.kernels import selection
from sae_lightning.registry import one_of
from sae_lightning.saes.codes import SparseCodes
from sae_lightning.saes.losses import nested
from sae_lightning.saes.sae import SAE, ForwardOutput, LossTerm


def powers_of_two(first: int, d_sae: int) -> list[int]:
    """``first``, 2·first, 4·first … below d_sae, and d_sae itself."""
    ks = []
    while first < d_sae:
        ks.append(first)
        first *= 2
    return [*ks, d_sae]


class MSAE(SAE):
    """x̂_i = TopK_{k_i} reconstructions for k_1 < … < k_h, trained together [MSAE §3.2].

    ``ks`` lists the k_i; by default powers of two times ``k`` up to d_sae. ``weighting`` "uniform" weighs all
    levels alike (UW), "reverse" by h - i + 1 (RW); the weights are scaled to sum 1. ``soft_cap`` c passes
    positive values through c · tanh(z / c). In evaluation the largest k_i is dropped and every positive
    pre-activation is active [§3.3]; ``codes.top(k)`` gives any other granularity.

    Raises ValueError for an impossible k-list, weighting or cap.
    """

    variant = "msae"
    losses: ClassVar[dict[str, LossTerm]] = {"nested": nested}
    k: int
    ks: Tensor
    level_weights: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        ks: list[int] | None = None,
        weighting: str = "uniform",
        soft_cap: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(d_in, d_sae, **options)
        if not 1 <= k <= d_sae or k != int(k):
            raise ValueError(f"k must be a whole number between 1 and d_sae = {d_sae}; got k={k}.")
        levels = powers_of_two(int(k), d_sae) if ks is None else [int(n) for n in ks]
        if sorted(set(levels)) != levels or not levels or levels[0] < 1 or levels[-1] > d_sae:
            raise ValueError(f"ks={levels} must ascend within 1 … d_sae = {d_sae}.")
        one_of(weighting, ("uniform", "reverse"), "weighting")
        if soft_cap is not None and not soft_cap > 0:
            raise ValueError(f"soft_cap must be positive, or null for none; got {soft_cap}.")
        self.k, self.given_ks, self.weighting, self.soft_cap = int(k), ks, weighting, soft_cap
        raw = torch.ones(len(levels)) if weighting == "uniform" else torch.arange(len(levels), 0, -1.0)
        self.register_buffer("ks", torch.tensor(levels), persistent=False)
        self.register_buffer("level_weights", raw / raw.sum(), persistent=False)

    def settings(self) -> dict[str, object]:
        given = None if self.given_ks is None else list(self.given_ks)
        chosen = {"k": self.k, "ks": given, "weighting": self.weighting, "soft_cap": self.soft_cap}
        return chosen | super().settings()

    def inference_forms(self) -> tuple[str, ...]:
        return ("relu",) if self.soft_cap is None else ()

    def code(self, x: Tensor) -> SparseCodes:
        most = int(self.ks[-1])
        if self.training and most < self.d_sae:
            codes = self.with_gradient(x, selection.topk(x - self.b_pre, self.W_enc, self.b_enc, most))
        else:
            codes = self.positive(x)
        cap = self.soft_cap
        return codes if cap is None else codes.map(lambda values, _: cap * torch.tanh(values / cap))

    def forward_pass(self, x: Tensor) -> ForwardOutput:
        codes = self.code(x)
        levels = codes.decode_levels(self.ks, self.W_dec, self.b_pre)
        return ForwardOutput(x, codes, levels[:, -1], levels, self.level_weights.to(x.dtype))
