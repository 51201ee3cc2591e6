"""Throughput while training: samples a second and the share of time spent waiting for data."""

from __future__ import annotations

from typing import Any

import lightning as L

from sae_lightning.features.datamodule import FeatureDataModule


class Throughput(L.Callback):
    """Logs ``speed/samples_per_second`` (all ranks together) and ``speed/wait_share``; keeps the run's totals.

    ``seconds_before`` counts the training time of earlier, interrupted attempts.
    """

    def __init__(self, data: FeatureDataModule) -> None:
        self.data = data
        self.seconds_before = 0.0
        self._start = 0.0
        self._samples = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._start = self.data.clock()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        self._samples += batch.numel() // batch.shape[-1] * trainer.world_size
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            record = {"speed/samples_per_second": self.samples_per_second, "speed/wait_share": self.wait_share}
            module.log_dict(record, rank_zero_only=True)

    @property
    def samples_per_second(self) -> float:
        return self._samples / max(1e-9, self.data.clock() - self._start)

    @property
    def wait_share(self) -> float:
        return self.data.wait_seconds / max(1e-9, self.data.clock() - self._start)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds_before + self.data.clock() - self._start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds_before = state["seconds"]
