"""MonoLoss for any SAE: a callback that adds it to the training loss."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from sae_lightning.registry import one_of
from sae_lightning.saes import ForwardOutput
from sae_lightning.saes.codes import POOLS
from sae_lightning.saes.monoloss import Memory, mono_loss
from sae_lightning.training.module import SAEModule


class MonoLoss(L.Callback):
    """Adds ``weight`` · (1 - mean batch MonoScore of the active latents) to the loss [MonoLoss §3.3].

    Similarities are cosines of the batch's own raw features, or with ``center`` of those without the store's mean.
    Batches of tokens compare tokens; batches of images (``stream.unit=images``) compare images, by the mean of their
    tokens' features, and a latent's activation on an image is the ``pool`` (max or mean) of those on its tokens.
    Under DDP the batch is that of all ranks together.

    A batch knows little of a latent that it activates two or three times. With ``memory`` = β > 0 the score is taken
    over this batch and all before it, whose activations count β as much with each further step: the sums behind the
    MonoScore as exponential moving ones, in which the batch alone has a gradient. Ours, not in the paper.

    The weight rises linearly over the first ``warmup`` share of all steps. With ``every`` = n the term is computed at
    each n-th step alone, n times as heavy. Works with every variant and every combination of other terms; logged as
    ``loss/mono``. Raises ValueError for impossible settings.
    """

    def __init__(
        self,
        weight: float,
        warmup: float = 0.0,
        every: int = 1,
        center: bool = False,
        pool: str = "max",
        memory: float = 0.0,
    ) -> None:
        if weight < 0 or not 0 <= warmup <= 1 or every < 1 or not 0 <= memory < 1:
            raise ValueError(
                f"callbacks.monoloss: weight={weight} must be at least 0, warmup={warmup} a share of all steps "
                f"(0 to 1), every={every} at least 1, memory={memory} at least 0 and below 1."
            )
        one_of(pool, POOLS, "callbacks.monoloss.pool")
        self.weight, self.warmup, self.every, self.center, self.pool = weight, warmup, every, center, pool
        self.memory = memory
        self.remembered: Memory | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and self.weight:
            if not isinstance(pl_module, SAEModule):
                raise TypeError("MonoLoss adds its term to an SAEModule.")
            self._module = pl_module
            pl_module.add_term("mono", self.term, self.weight_at)

    def weight_at(self, step: int, steps: int) -> float:
        """The term's weight at ``step`` of ``steps``."""
        if step % self.every:
            return 0.0
        rise = min(1.0, (step + 1) / max(1.0, self.warmup * steps)) if self.warmup else 1.0
        return self.weight * rise * self.every

    def term(self, run: ForwardOutput, batch: Tensor) -> Tensor:
        """MonoLoss of a pass over raw features [B, d_in] or [n, P, d_in]."""
        features: Any = batch
        codes = run.codes
        if self.center:
            features = self._module.sae.normalizer.normalize(features)
        if batch.ndim == 3:
            codes = codes.pool(batch.shape[1], self.pool)
            features = features.float().mean(1)
        if self.memory and self.remembered is None:
            self.remembered = Memory.empty(self.memory, codes.d_sae, features.shape[1], codes.values.detach())
        return mono_loss(codes, features, self._on(codes.values.device))

    def _on(self, device: torch.device) -> Memory | None:
        if self.remembered is not None and self.remembered.w.device != device:  # restored from a checkpoint
            m = self.remembered
            self.remembered = Memory(m.decay, m.w.to(device), m.u.to(device), m.v.to(device))
        return self.remembered

    def state_dict(self) -> dict[str, Any]:
        m = self.remembered
        return {} if m is None else {"w": m.w, "u": m.u, "v": m.v}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.remembered = Memory(self.memory, **state) if state else None
