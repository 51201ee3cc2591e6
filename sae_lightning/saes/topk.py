"""TopK SAE: the k largest positive pre-activations of each sample."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lightning.saes.base import SAE
from sae_lightning.saes.codes import SparseCodes
from sae_lightning.saes.normalizer import Normalizer


def topk_codes(pre_acts: Tensor, k: int) -> SparseCodes:
    """Codes with the k largest entries of each row of ``pre_acts`` [N, d_sae], those that are positive."""
    values, latents = torch.relu(pre_acts).topk(k, dim=1, sorted=False)
    positive = values.detach() > 0
    offsets = torch.zeros(len(pre_acts) + 1, dtype=torch.long, device=pre_acts.device)
    torch.cumsum(positive.sum(1), 0, out=offsets[1:])
    return SparseCodes(latents[positive], values[positive], offsets, pre_acts.shape[1])


class TopK(SAE):
    """The ``k`` largest pre-activations a sample, negative ones dropped [Gao et al. 2024].

    Raises ValueError unless 1 <= k <= d_sae.
    """

    variant = "topk"

    def __init__(
        self, d_in: int, d_sae: int, k: int, normalizer: Normalizer | None = None, seed: int | None = None
    ) -> None:
        super().__init__(d_in, d_sae, normalizer, seed)
        if not 1 <= k <= d_sae:
            raise ValueError(f"k must lie between 1 and d_sae = {d_sae}; got k={k}. Lower k or raise expansion.")
        self.k = k

    def settings(self) -> dict[str, object]:
        return {"k": self.k}

    def activate(self, pre_acts: Tensor) -> SparseCodes:
        return topk_codes(pre_acts, self.k)
