"""TopK SAE: the k largest positive pre-activations of each sample."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sae_lightning.kernels import portable, selection
from sae_lightning.registry import one_of
from sae_lightning.saes.codes import SparseCodes
from sae_lightning.saes.sae import SAE


def topk_codes(pre_acts: Tensor, k: int) -> SparseCodes:
    """Codes with the k largest entries of each row of dense ``pre_acts`` [N, d_sae], those that are positive."""
    chosen = portable.topk(pre_acts, pre_acts.new_zeros(()), k)
    return SparseCodes(*selection.packed(*chosen), pre_acts.shape[1])


class TopK(SAE):
    """The ``k`` largest pre-activations a sample, negative ones dropped [Gao et al. 2024].

    ``k_now``, which training may anneal from above, is what ``code`` uses. ``inference`` "relu" keeps every
    positive pre-activation in evaluation [MSAE §3.3], "topk" the k largest.

    Raises ValueError unless 1 <= k <= d_sae is whole.
    """

    variant = "topk"
    k: int

    def __init__(self, d_in: int, d_sae: int, k: int, inference: str = "topk", **options: Any) -> None:
        super().__init__(d_in, d_sae, **options)
        if k != int(k) or not 1 <= k <= d_sae:
            raise ValueError(
                f"k must be a whole number between 1 and d_sae = {d_sae}; got k={k}. Lower k or raise expansion."
            )
        self.k, self.k_now = int(k), float(k)
        self.inference = one_of(inference, ("topk", "relu"), "inference")

    def settings(self) -> dict[str, object]:
        chosen: dict[str, object] = {"k": self.k}
        return chosen | ({"inference": "relu"} if self.inference == "relu" else {}) | super().settings()

    def inference_forms(self) -> tuple[str, ...]:
        return (self.inference,)

    def without_selection(self) -> None:
        self.inference = "relu"

    def code(self, x: Tensor) -> SparseCodes:
        if not self.training and self.inference == "relu":
            return self.positive(x)
        k = round(self.k_now) if self.training else self.k
        return self.with_gradient(x, selection.topk(x - self.b_pre, self.W_enc, self.b_enc, min(k, self.d_sae)))
