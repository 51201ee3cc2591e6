"""Callbacks that end a run in the middle, as a kill or a cluster would."""

import os
import signal
import time
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist


class Crash(L.Callback):
    """Raises RuntimeError at the start of ``epoch``, on ``rank`` only if one is given."""

    looks_on = True

    def __init__(self, epoch: int, rank: int | None = None) -> None:
        self.epoch, self.rank = epoch, rank

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        here = dist.get_rank() if dist.is_initialized() else 0
        if trainer.current_epoch == self.epoch and self.rank in (None, here):
            raise RuntimeError("the power went out")


class NotANumber(L.Callback):
    """Makes the loss NaN in step ``at``."""

    looks_on = True

    def __init__(self, at: int) -> None:
        self.at = at

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            weight = lambda step, steps: float(step == self.at)  # noqa: E731
            pl_module.add_term("bad", lambda run, batch: run.reconstruction.sum() * float("nan"), weight)


class Signal(L.Callback):
    """Rank 0 sends ``name`` to process ``pid``, by default its own, in step ``at``; each step from there on is slow.

    With ``pids``, a folder, every rank leaves a file there that its process id names.
    """

    looks_on = True

    def __init__(self, at: int, name: str = "SIGUSR1", pid: int | None = None, pids: str | None = None) -> None:
        self.at, self.name, self.pid, self.pids = at, name, pid, pids

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        if trainer.global_step == self.at:
            if self.pids is not None:
                (Path(self.pids) / str(os.getpid())).touch()
            if trainer.is_global_zero and self.name:
                os.kill(self.pid or os.getpid(), getattr(signal, self.name))
        if trainer.global_step >= self.at and (self.pid or self.pids):
            time.sleep(0.4)


class SameWeights(L.Callback):
    """At the end of training: RuntimeError unless all ranks have the same parameters and buffers, bit for bit."""

    looks_on = True

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for name, tensor in module.sae.state_dict().items():  # type: ignore[union-attr,operator]
            everywhere = [torch.empty_like(tensor) for _ in range(trainer.world_size)]
            if trainer.world_size > 1:
                dist.all_gather(everywhere, tensor.contiguous())
            if any(not torch.equal(other, tensor) for other in everywhere if trainer.world_size > 1):
                raise RuntimeError(f"{name} differs between ranks")
