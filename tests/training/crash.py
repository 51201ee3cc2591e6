"""A callback that ends a run in the middle, as a kill would."""

import lightning as L
import torch.distributed as dist


class Crash(L.Callback):
    """Raises RuntimeError at the start of ``epoch``, on ``rank`` only if one is given."""

    def __init__(self, epoch: int, rank: int | None = None) -> None:
        self.epoch, self.rank = epoch, rank

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        here = dist.get_rank() if dist.is_initialized() else 0
        if trainer.current_epoch == self.epoch and self.rank in (None, here):
            raise RuntimeError("the power went out")
