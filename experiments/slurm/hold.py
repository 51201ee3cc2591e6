"""A callback that holds a training in one step, so that a test can do something to it there."""

import os
import time
from pathlib import Path

import lightning as L

from sae_lightning.distributed.stopping import stop_requested


class Hold(L.Callback):
    """After step ``at``: rank 0 writes its process id to ``FILE.reached``; all wait for ``file`` or a signal."""

    def __init__(self, at: int, file: str) -> None:
        self.at, self.file = at, Path(file)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        if trainer.global_step != self.at:
            return
        if trainer.is_global_zero:
            self.file.with_name(f"{self.file.name}.reached").write_text(str(os.getpid()), encoding="utf-8")
        while not self.file.exists() and not stop_requested():
            time.sleep(0.1)
