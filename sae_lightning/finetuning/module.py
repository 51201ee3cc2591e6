"""The LightningModule: cross entropy + λ · MonoLoss [MonoLoss §3.3 eq. 3, §4.2], SGD with warm-up and decay."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric

from sae_lightning.finetuning.classifier import Classifier
from sae_lightning.finetuning.data import FinetuneError
from sae_lightning.registry import one_of
from sae_lightning.saes.monoloss import dense_mono_loss
from sae_lightning.training.module import Schedule

SHAPES = ("cosine", "constant")


class FinetuneModule(L.LightningModule):
    """Trains ``classifier`` on batches (pixels, labels, embeddings); no embeddings are needed with ``mono_weight`` 0.

    ``optimizer`` holds SGD's ``lr``, ``momentum``, ``weight_decay`` and further arguments; ``schedule`` the ``shape``
    (cosine to 0, or constant) and ``warmup_epochs`` of linear rise before it. Logs ``train/loss``,
    ``train/accuracy``, ``loss/cross_entropy``, ``loss/mono``, ``val/accuracy`` and ``val/cross_entropy``.
    """

    def __init__(
        self, classifier: Classifier, mono_weight: float, optimizer: dict[str, Any], schedule: dict[str, Any]
    ) -> None:
        super().__init__()
        check_schedule(schedule)
        self.classifier, self.mono_weight = classifier, float(mono_weight)
        self.optimizer, self.schedule = dict(optimizer), dict(schedule)
        self.val_accuracy, self.val_cross_entropy = MeanMetric(), MeanMetric()

    def losses(self, pixels: Tensor, labels: Tensor, embeddings: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """The terms ``cross_entropy`` and, with a weight, ``mono``; and the logits [b, n_classes].

        MonoLoss is computed in float32 at least, whatever autocast is on, and over the batches of all ranks.
        """
        logits, activations = self.classifier(pixels)
        terms = {"cross_entropy": F.cross_entropy(logits, labels)}
        if self.mono_weight > 0:
            assert embeddings is not None
            with torch.autocast(activations.device.type, enabled=False):
                exact = activations if activations.dtype == torch.float64 else activations.float()
                terms["mono"] = dense_mono_loss(exact, embeddings)
        return terms, logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        pixels, labels, *rest = batch
        terms, logits = self.losses(pixels, labels, rest[0] if rest else None)
        loss = terms["cross_entropy"] + self.mono_weight * terms.get("mono", 0.0)
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            record = {f"loss/{name}": term.detach() for name, term in terms.items()}
            record |= {"train/loss": loss.detach(), "train/accuracy": correct(logits, labels).mean()}
            self.log_dict(record, sync_dist=True, batch_size=len(labels))
            self.log("accuracy", record["train/accuracy"], prog_bar=True, logger=False, batch_size=len(labels))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pixels, labels = batch
        logits = self.classifier(pixels).logits.float()
        self.val_accuracy.update(correct(logits, labels))
        self.val_cross_entropy.update(F.cross_entropy(logits, labels, reduction="none"))

    def on_validation_epoch_end(self) -> None:
        for name, metric in (("accuracy", self.val_accuracy), ("cross_entropy", self.val_cross_entropy)):
            self.log(f"val/{name}", metric.compute(), prog_bar=name == "accuracy")  # reduced over ranks already
            metric.reset()

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.classifier.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, **self.optimizer)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        plan = schedule_of(self.schedule, int(self.trainer.max_epochs or 1))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: plan.lr_factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """1 where the largest of ``logits`` [b, n_classes] is at the label, else 0; [b] float32."""
    return (logits.argmax(1) == labels).float()


def schedule_of(schedule: dict[str, Any], epochs: int) -> Schedule:
    """The schedule in shares of ``epochs``."""
    warmup = min(1.0, schedule["warmup_epochs"] / epochs)
    return Schedule(warmup=warmup, decay=1.0 - warmup if schedule["shape"] == "cosine" else 0.0, shape="cosine")


def check_schedule(schedule: dict[str, Any]) -> None:
    """FinetuneError for an unknown shape or a negative warm-up."""
    one_of(schedule["shape"], SHAPES, "schedule.shape", FinetuneError)
    if schedule["warmup_epochs"] < 0:
        raise FinetuneError(f"schedule.warmup_epochs={schedule['warmup_epochs']} must not be negative.")


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
