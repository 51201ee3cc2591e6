"""How long each epoch's training takes."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import lightning as L
import torch


class EpochClock(L.Callback):
    """Seconds from an epoch's beginning to the end of its last step, without validation; kept in the checkpoint.

    Epochs that were interrupted are left out. ``seconds_before`` counts the time of earlier, interrupted attempts.
    """

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.seconds_before = 0.0
        self._run = self._epoch = self._step = time.monotonic()
        self._whole = False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._run = time.monotonic()

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._epoch, self._whole = time.monotonic(), True

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        if trainer.is_last_batch and self._whole:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.epochs.append(time.monotonic() - self._epoch)
            self._whole = False

    @property
    def seconds_an_epoch(self) -> float | None:
        """The median, without the first epoch where there are more; None when no epoch was whole."""
        return median(self.epochs[1:] or self.epochs) if self.epochs else None

    @property
    def seconds(self) -> float:
        """Of the whole training so far."""
        return self.seconds_before + time.monotonic() - self._run

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "epochs": list(self.epochs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds_before, self.epochs = state["seconds"], list(state["epochs"])
