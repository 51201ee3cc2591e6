"""Dead latents started anew from the inputs that the dictionary reconstructs worst."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from sae_lightning.saes import SAE, JumpReLU
from sae_lightning.saes.input_norm import input_norm
from sae_lightning.saes.ranks import world_size

ENCODER_SHARE = 0.2  # of the living latents' mean encoder norm, so that a new latent starts quietly [Bricken et al.]


class Resample(L.Callback):
    """Every ``every`` steps, up to the share ``until`` of all, reinitialises latents dead for ``dead_after`` tokens.

    Each takes the error direction of an input drawn with probability ∝ squared error² [Bricken et al. 2023,
    "Neuron resampling"] as its decoder row and, scaled down, as its encoder row; its bias, its optimiser state and
    its counter start at zero. All ranks make the same draw from the first rank's batch.
    """

    def __init__(self, every: int, dead_after: int, until: float = 0.8) -> None:
        if every < 1 or not 0 < until <= 1:
            raise ValueError(f"resample.every={every} must be at least 1 and resample.until={until} in (0, 1].")
        self.every, self.dead_after, self.until = every, dead_after, until
        self.resampled = 0
        self.step = 0  # after the last batch; with accumulate_grad_batches several are one step

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Tensor, index: int
    ) -> None:
        step, before, self.step = trainer.global_step, self.step, trainer.global_step
        if step == before or step % self.every or step > self.until * int(trainer.estimated_stepping_batches):
            return
        sae: SAE = module.sae  # type: ignore[assignment]
        x, _ = input_norm(sae.input_norm, sae.normalizer.normalize(batch.flatten(0, -2)))
        optimizer = trainer.optimizers[0]
        generator = torch.Generator().manual_seed(step)
        count = resample(sae, x, self.dead_after, optimizer, generator)
        self.resampled += count
        if trainer.is_global_zero and count and trainer.logger is not None:
            module.log("train/resampled", float(count), rank_zero_only=True)

    def state_dict(self) -> dict[str, Any]:
        return {"resampled": self.resampled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.resampled = state["resampled"]


@torch.no_grad()
def resample(
    sae: SAE, x: Tensor, dead_after: int, optimizer: torch.optim.Optimizer | None, generator: torch.Generator
) -> int:
    """Reinitialise dead latents of ``sae`` from normalised features ``x`` [N, d_in]; returns how many."""
    dead = (sae.tokens_since_fired >= dead_after).nonzero().squeeze(1)
    if len(dead) == 0:
        return 0
    codes = sae.code(x) if not sae.training else _in_evaluation(sae, x)
    error = x - codes.decode(sae.W_dec, sae.b_pre)
    chance = error.square().sum(1).square().double().cpu() + 1e-12
    drawn = torch.multinomial(chance, len(dead), replacement=len(dead) > len(chance), generator=generator)
    directions = torch.nn.functional.normalize(error[drawn.to(x.device)], dim=1)
    if world_size() > 1:
        dist.broadcast(directions, 0)
    living = torch.ones(sae.d_sae, dtype=torch.bool, device=x.device)
    living[dead] = False
    norm = sae.W_enc[living].norm(dim=1).mean() if bool(living.any()) else sae.W_enc.new_ones(())
    sae.W_dec[dead] = directions
    if not sae.tied:
        sae.W_enc[dead] = ENCODER_SHARE * norm * directions
    fresh = [(sae.W_dec, dead), (sae.W_enc, dead)]
    for name in ("b_enc", "b_gate", "r_mag"):
        if hasattr(sae, name):
            getattr(sae, name)[dead] = 0
            fresh.append((getattr(sae, name), dead))
    if isinstance(sae, JumpReLU) and bool(living.any()):
        sae.log_threshold[dead] = sae.log_threshold[living].mean()
        fresh.append((sae.log_threshold, dead))
    for parameter, rows in fresh if optimizer is not None else []:
        for value in optimizer.state[parameter].values():  # type: ignore[union-attr]
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value[rows] = 0
    sae.tokens_since_fired[dead] = 0
    return len(dead)


def _in_evaluation(sae: SAE, x: Tensor):  # type: ignore[no-untyped-def]
    sae.eval()
    try:
        return sae.code(x)
    finally:
        sae.train()
