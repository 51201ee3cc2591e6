"""MP-SAE: codes by matching pursuit, one latent after the other, each from what the earlier ones left."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from sae_lightning.saes import SAE, SparseCodes


class MatchingPursuit(SAE):
    """``k`` steps of matching pursuit over the decoder's rows [Costa et al. 2025, arXiv 2506.03093].

    Each step takes the row with the largest product with the residual, adds that product to the row's code, and takes
    its part from the residual; a row that is taken twice counts once, with both. There is no encoder. Known weakness:
    on features in superposition it also fits the interference between latents (arXiv 2602.14687).

    Codes are those of the products, differentiable in the rows that were chosen; memory is N · d_sae. ValueError unless
    1 <= k <= d_sae is whole.
    """

    variant = "mp"
    frozen: ClassVar[tuple[str, ...]] = ("b_enc",)
    restarts = False

    def __init__(self, d_in: int, d_sae: int, k: int, **options: Any) -> None:
        super().__init__(d_in, d_sae, **options | {"tied": True})
        if k != int(k) or not 1 <= k <= d_sae:
            raise ValueError(f"k must be a whole number between 1 and d_sae = {d_sae}; got k={k}.")
        self.k, self.k_now = int(k), float(k)

    def settings(self) -> dict[str, object]:
        return {"k": self.k} | {name: value for name, value in super().settings().items() if name != "tied"}

    def inference_forms(self) -> tuple[str, ...]:
        return ()  # no other package's encoder gives these codes

    def code(self, x: Tensor) -> SparseCodes:
        rest, dense = x - self.b_pre, x.new_zeros(len(x), self.d_sae)
        for _ in range(round(self.k_now) if self.training else self.k):
            with torch.no_grad():
                chosen = (rest @ self.W_dec.T).argmax(1)
            rows = self.W_dec[chosen]
            product = (rest * rows).sum(1, keepdim=True)
            dense = dense.scatter_add(1, chosen[:, None], product)
            rest = rest - product * rows
        return SparseCodes.select(dense, dense.detach() > 0)
