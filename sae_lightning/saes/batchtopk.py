"""BatchTopK SAE: k active latents a sample on average over the batch, a fixed threshold afterwards."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from sae_lightning.saes.base import SAE
from sae_lightning.saes.codes import SparseCodes
from sae_lightning.saes.normalizer import Normalizer
from sae_lightning.saes.ranks import world_size


class BatchTopK(SAE):
    """The ``k * N`` largest pre-activations of the global batch (all DDP ranks) [Bussmann et al. 2024].

    In evaluation mode a latent is active where its pre-activation exceeds ``threshold``, so that a
    sample's code does not depend on its batch. Training keeps a running average of the smallest kept
    activation there; ``calibrate`` replaces it by the value that gives k active latents on held-out data.

    Raises ValueError unless 0 < k <= d_sae (k may be a fraction).
    """

    variant = "batchtopk"
    threshold: Tensor

    def __init__(
        self, d_in: int, d_sae: int, k: float, normalizer: Normalizer | None = None, seed: int | None = None
    ) -> None:
        super().__init__(d_in, d_sae, normalizer, seed)
        if not 0 < k <= d_sae:
            raise ValueError(f"k must lie above 0 and up to d_sae = {d_sae}; got k={k}. Lower k or raise expansion.")
        self.k = k
        self.register_buffer("threshold", torch.tensor(0.0))

    def settings(self) -> dict[str, object]:
        return {"k": self.k}

    def activate(self, pre_acts: Tensor) -> SparseCodes:
        if not self.training:
            return SparseCodes.select(pre_acts, pre_acts.detach() > self.threshold.clamp_min(0))
        cut = self._batch_cut(pre_acts.detach())
        codes = SparseCodes.select(pre_acts, pre_acts.detach() >= cut)
        started = self.threshold > 0
        self.threshold.copy_(torch.where(started, self.threshold.lerp(cut, 0.01), cut))
        return codes

    def _batch_cut(self, pre_acts: Tensor) -> Tensor:
        """The ``k * N``-th largest positive pre-activation over all ranks, a scalar."""
        world = world_size()
        budget = max(1, round(self.k * len(pre_acts) * world))
        candidates = largest(pre_acts, budget, guess=0.8 * self.threshold)
        if world > 1:
            padded = candidates.new_zeros(budget)
            padded[: len(candidates)] = candidates
            gathered = candidates.new_empty(world * budget)
            dist.all_gather_into_tensor(gathered, padded)
            candidates = gathered.topk(budget, sorted=False).values
        # fewer positive entries than the budget: all of them stay
        cut = candidates.min() if len(candidates) == budget else candidates.new_zeros(())
        return cut.clamp_min(torch.finfo(cut.dtype).tiny)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor], n_samples: int) -> float:
        """Set ``threshold`` so that the held-out raw features have k active latents on average; returns it.

        ``batches`` yields [N, d_in] tensors, ``n_samples`` rows in all. Exact over all of them; holds k
        values a sample in memory. Raises ValueError when another number of rows comes.
        """
        budget = round(self.k * n_samples) + 1
        kept, seen = self.W_enc.new_empty(0), 0
        for features in batches:
            x = self.normalizer.normalize(features.reshape(-1, self.d_in).to(self.W_enc.device))
            seen += len(x)
            values = self.pre_acts(x).flatten()
            lowest = kept.min() if len(kept) == budget else kept.new_zeros(())
            kept = _top(torch.cat([kept, values[values > lowest]]), budget)
        if seen != n_samples or seen == 0:
            raise ValueError(f"calibrate was promised {n_samples} held-out samples (at least one) and got {seen}.")
        self.threshold.copy_(kept.min() if len(kept) == budget else kept.new_zeros(()))
        return float(self.threshold)


def _top(values: Tensor, count: int) -> Tensor:
    return values if len(values) <= count else values.topk(count, sorted=False).values


def largest(values: Tensor, count: int, guess: Tensor) -> Tensor:
    """The ``count`` largest positive entries of ``values`` (fewer if fewer are positive), 1-d, unordered.

    Exact for any ``guess``; a guess a little below the smallest of them makes it several times faster,
    since only the entries above it are then compared.
    """
    above = values[values > guess.clamp_min(0)]
    if len(above) < count:
        above = values[values > 0]
    return _top(above, count)
