"""``history.csv`` in every run folder, whatever logger is chosen: what the report's curves are drawn from."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import lightning as L

from sae_lightning.damage import set_aside
from sae_lightning.saes.artefact import write_text


class History(L.Callback):
    """Appends the logged scalars as rows of step, epoch and one column a metric; rank 0 only.

    A resumed run goes on in the same file; rows past the checkpoint's step are dropped first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, str | int | float]] = []
        self.step = 0  # after the last batch; several batches are one step with accumulate_grad_batches

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.step = trainer.global_step  # not in on_fit_start: it is not restored by then
        if trainer.is_global_zero and self.path.is_file() and trainer.global_step > 0:
            try:
                rows = list(csv.DictReader(self.path.read_text(encoding="utf-8").splitlines()))
                self.rows = [row for row in rows if int(row["step"]) <= trainer.global_step]
            except (ValueError, KeyError, TypeError, csv.Error) as error:
                set_aside(self.path, f"{type(error).__name__}: {error}", "the curves begin at this step")

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        step, self.step = self.step, trainer.global_step
        if self.step > step and self.step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._append(trainer, ("train/", "loss/"))

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._append(trainer, ("val/",))
            self.write(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict) -> None:
        self.write(trainer)  # so that a run that goes on there has all rows before it

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.write(trainer)

    def _append(self, trainer: L.Trainer, prefixes: tuple[str, ...]) -> None:
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(prefixes)}
        if values:
            self.rows.append({"step": trainer.global_step, "epoch": trainer.current_epoch, **values})

    def write(self, trainer: L.Trainer) -> None:
        """Write all rows, replacing the file in one move."""
        if not trainer.is_global_zero or not self.rows:
            return
        columns = ["step", "epoch", *sorted({k for row in self.rows for k in row} - {"step", "epoch"})]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())
