"""What watches a training: it stops at a signal, resamples dead latents, measures the speed, writes the history."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from sae_lightning.distributed.ranks import world_size
from sae_lightning.distributed.stopping import FLAG, STEPS, Preempted, in_training, stop_requested, take_signals
from sae_lightning.files import set_aside, write_text
from sae_lightning.saes import SAE
from sae_lightning.training.data import FeatureDataModule


class StopOnSignal(Checkpoint):
    """Ends training after the step in which a signal came: writes a checkpoint to ``path`` and raises Preempted.

    All ranks stop at the same step: a flag is reduced over them in the background of each step and read after the
    next one. At the last batch of an epoch it waits for validation and the end of the epoch. A Checkpoint, so that
    Lightning calls it after all other callbacks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._working: Any = None
        self._group: Any = None
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._pending: Any = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        take_signals()
        self._working = in_training()
        self._working.__enter__()
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")  # on the CPU, so that no step waits for the GPU

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        take_signals()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        signum = self._agreed()
        if signum and not trainer.is_last_batch:
            self._stop(trainer, signum)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        signum = self._agreed()
        if signum:
            self._stop(trainer, signum)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._leave()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self._leave(drain=False)

    def _agreed(self) -> int:
        """The largest number of a signal on any rank, one call late where there are several; 0: go on."""
        here = stop_requested() or 0
        if self._group is None:
            return here
        agreed = 0
        if self._pending is not None:
            self._pending.wait()
            agreed = int(self._flag)
        self._flag = torch.tensor([here], dtype=torch.int32)
        self._pending = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def _stop(self, trainer: L.Trainer, signum: int) -> NoReturn:
        trainer.save_checkpoint(self.path)
        if FLAG in os.environ and trainer.is_global_zero:
            with open(os.environ[FLAG] + STEPS, "a", encoding="utf-8") as file:
                file.write(f"{trainer.global_step}\n")
        raise Preempted(signum, trainer.global_step)

    def _leave(self, drain: bool = True) -> None:
        if drain and self._pending is not None:
            self._pending.wait()
        self._pending = self._group = None
        if self._working is not None:
            self._working.__exit__(None, None, None)
            self._working = None


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
        x, _ = sae.inputs(batch)
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
    """Reinitialise dead latents of ``sae`` from the encoder's inputs ``x`` [N, d_in]; returns how many."""
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
    for name, value in sae.latent_parameters().items():
        if value is not None or bool(living.any()):
            rows = sae.get_parameter(name)
            rows[dead] = rows[living].mean() if value is None else value
            fresh.append((rows, dead))
    for parameter, latents in fresh if optimizer is not None else []:
        for moment in optimizer.state[parameter].values():  # type: ignore[union-attr]
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                moment[latents] = 0
    sae.tokens_since_fired[dead] = 0
    return len(dead)


def _in_evaluation(sae: SAE, x: Tensor):  # type: ignore[no-untyped-def]
    sae.eval()
    try:
        return sae.code(x)
    finally:
        sae.train()


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
