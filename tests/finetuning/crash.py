"""A callback that ends a run in the middle of an epoch, as a kill would."""

import lightning as L


class CrashAfter(L.Callback):
    """Raises RuntimeError at the beginning of the step after ``steps`` of them."""

    looks_on = True

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        if trainer.global_step == self.steps:
            raise RuntimeError("the power went out")
