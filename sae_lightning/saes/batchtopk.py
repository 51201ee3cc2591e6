"""BatchTopK SAE: k active latents a sample on average over the batch, a fixed threshold afterwards."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from sae_lightning.distributed.ranks import sum_over_ranks, world_size
from sae_lightning.kernels import selection
from sae_lightning.kernels.selection import kth_largest_of_all, kth_largest_over_ranks, kth_positive_over_ranks
from sae_lightning.registry import one_of
from sae_lightning.saes.codes import SparseCodes
from sae_lightning.saes.sae import SAE

INFINITE = float("inf")
NOT_OURS = -1.0  # no threshold of training's


class BatchTopK(SAE):
    """The ``k * N`` largest pre-activations of the global batch (all DDP ranks) [Bussmann et al. 2024].

    ``k_per`` "batch" counts k a batch instead of a sample [MonoLoss §B]. In evaluation mode a latent is active
    where its pre-activation exceeds ``inference_threshold()``, so that a sample's code does not depend on its batch.
    Training follows the smallest kept activation in three ways: ``threshold`` as a running average, ``lowest`` as a
    running minimum, and ``latest``, that of the last step. ``calibrate`` sets the threshold to the value that gives k
    active latents on held-out data, ``use_average`` and ``use_lowest`` to the former two. Until one of them is called
    ``latest`` stands in for it, because the running average lags far behind a short training. An SAE without training
    or threshold keeps the k largest of each sample (each batch, where k is a batch's), and warns.

    Raises ValueError unless 0 < k <= d_sae (k may be a fraction).
    """

    variant = "batchtopk"
    k: float
    threshold: Tensor
    average: Tensor
    lowest: Tensor
    latest: Tensor
    later_buffers: ClassVar[dict[str, float]] = {"lowest": INFINITE, "average": NOT_OURS, "latest": INFINITE}

    def __init__(self, d_in: int, d_sae: int, k: float, k_per: str = "sample", **options: Any) -> None:
        super().__init__(d_in, d_sae, **options)
        one_of(k_per, ("sample", "batch"), "k_per")
        if k_per == "sample" and not 0 < k <= d_sae:
            raise ValueError(f"k must lie above 0 and up to d_sae = {d_sae}; got k={k}. Lower k or raise expansion.")
        if k <= 0:
            raise ValueError(f"k must be positive; got k={k}.")
        self.k, self.k_now, self.k_per = k, float(k), k_per
        self.register_buffer("threshold", torch.tensor(0.0))
        self.register_buffer("average", torch.tensor(0.0))  # the threshold as training left it, NOT_OURS once it is set
        self.register_buffer("lowest", torch.tensor(INFINITE))
        self.register_buffer("latest", torch.tensor(INFINITE))

    def settings(self) -> dict[str, object]:
        chosen: dict[str, object] = {"k": self.k}
        return chosen | ({"k_per": "batch"} if self.k_per == "batch" else {}) | super().settings()

    def logged(self) -> dict[str, Tensor]:
        return {"threshold": self.threshold}

    def inference_forms(self) -> tuple[str, ...]:
        return (self.variant, "jumprelu")

    def without_selection(self) -> None:
        self._set(torch.zeros_like(self.threshold))

    def cuts(self) -> Tensor:
        return self.inference_threshold().repeat(self.d_sae)

    def set_cuts(self, cuts: Tensor) -> None:
        self._set(cuts[0].clamp_min(0))

    def finish(self, batches: Iterable[Tensor], n_samples: int, how: str) -> None:
        """Set the threshold: on held-out data (ViSAEBench Table 1), or as training's cuts leave it."""
        if how == "running_average":
            self.use_average()
        elif how == "running_minimum":
            self.use_lowest()
        else:
            self.calibrate(batches, n_samples)

    def code(self, x: Tensor) -> SparseCodes:
        if self.training:
            entries, cut = self._batch_entries(x, self.budget(len(x) * world_size()), kth_largest_over_ranks)
            self._follow(cut)
            return self.with_gradient(x, entries)
        cut = self.inference_threshold()
        if bool(cut.isfinite()):
            return self.with_gradient(x, selection.above(x - self.b_pre, self.W_enc, self.b_enc, cut))
        warnings.warn(
            "This BatchTopK has neither been trained nor given a threshold, and keeps the k largest activations of "
            f"each {self.k_per} instead; call calibrate with held-out features.",
            stacklevel=2,
        )
        if self.k_per == "batch":
            return self.with_gradient(x, self._batch_entries(x, max(1, round(self.k)), kth_largest_of_all)[0])
        return self.with_gradient(x, selection.topk(x - self.b_pre, self.W_enc, self.b_enc, math.ceil(self.k)))

    def inference_threshold(self) -> Tensor:
        """What a pre-activation must exceed in evaluation, a scalar of at least 0; infinity where nothing is known."""
        return torch.where(self.threshold == self.average, self.latest, self.threshold).clamp_min(0)

    @torch.no_grad()
    def _follow(self, cut: Tensor) -> None:
        """Take the smallest kept activation of a training step into account, if there is one."""
        if bool(cut.isfinite()):
            self.threshold.copy_(torch.where(self.threshold > 0, self.threshold.lerp(cut, 0.01), cut))
            self.average.copy_(self.threshold)
            self.lowest.copy_(torch.minimum(self.lowest, cut))
            self.latest.copy_(cut)

    def budget(self, n_samples: int) -> int:
        """Active latents in a global batch of ``n_samples``."""
        return max(1, round(self.k_now * (n_samples if self.k_per == "sample" else 1)))

    @torch.no_grad()
    def _batch_entries(
        self, x: Tensor, budget: int, cut_of: Callable[[Tensor, int], Tensor]
    ) -> tuple[selection.Entries, Tensor]:
        """The entries among the ``budget`` largest by ``cut_of``, and the smallest of these (a scalar)."""
        found = selection.largest(x - self.b_pre, self.W_enc, self.b_enc, budget)
        cut = cut_of(found[1], budget)  # with fewer positive entries all of them stay
        return selection.keep(found, found[1] >= cut), cut

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor], n_samples: int) -> float:
        """Set ``threshold`` so that the held-out raw features have k active latents on average; returns it.

        ``batches`` gives [N, d_in] tensors, ``n_samples`` rows in all, each time that it is iterated (a list, say).
        Exact over all of them; holds about k values a sample in memory. Under DDP all ranks call it, each with its
        share of the batches, and get the threshold of all. Computed where the weights are. Raises ValueError when
        another number of rows comes, or with k a batch.
        """
        if self.k_per == "batch":
            raise ValueError("calibrate needs k a sample (k_per=sample); with k a batch use the running threshold.")
        budget = round(self.k * n_samples) + 1
        for share in (0.8, 0.4, 0.0):
            kept, seen = self._values_above(batches, share * self.threshold.clamp_min(0), budget)
            if not 0 < seen == n_samples:
                raise ValueError(f"calibrate was promised {n_samples} held-out samples (at least one) and got {seen}.")
            cut = kth_positive_over_ranks(kept, budget)
            if float(cut) > 0 or float(self.threshold) <= 0:
                break
        return self._set(cut)

    def _values_above(self, batches: Iterable[Tensor], floor: Tensor, budget: int) -> tuple[Tensor, int]:
        """This rank's largest pre-activations above ``floor``, at most ``budget``, and all ranks' samples."""
        kept, seen = self.W_enc.new_empty(0), 0
        for features in batches:
            x, _ = self.inputs(features.to(self.W_enc.device))
            seen += len(x)
            kept = torch.cat([kept, selection.above(x - self.b_pre, self.W_enc, self.b_enc, floor)[1]])
            if len(kept) > budget:
                kept = kept.topk(budget, sorted=False).values
                floor = kept.min()
        return kept, int(sum_over_ranks(torch.tensor(seen, device=kept.device)))

    def use_lowest(self) -> float:
        """Set ``threshold`` to the running minimum of training's cuts; returns it."""
        return self._set(torch.where(self.lowest.isfinite(), self.lowest, self.threshold))

    def use_average(self) -> float:
        """Keep the running average of training's cuts as the threshold; returns it."""
        return self._set(self.threshold)

    def _set(self, threshold: Tensor) -> float:
        self.threshold.copy_(threshold)
        self.average.fill_(NOT_OURS)
        return float(self.threshold)
