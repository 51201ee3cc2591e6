"""Trainings whose loss, weights or scores are not finite: they stop at once, and leave what is needed to look at them.

``failed.json`` in a run's folder says why; ``failed/`` holds the weights, the batch and the states of the generators
as they were before the step.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_lightning.distributed.launch import node
from sae_lightning.files import write_json
from sae_lightning.runs.run import CHECKPOINTS, FAILED, HISTORY, LOCK, RESULT, WEIGHTS
from sae_lightning.runs.state import failure
from sae_lightning.training.checkpoints import remove_checkpoints

KEPT = (FAILED, CHECKPOINTS, HISTORY, WEIGHTS, "trained.json", RESULT)

LEFT = "failed"

ADVICE = "lower optimizer.lr, clip with trainer.gradient_clip_val, or set trainer.precision=32-true"


class NotFiniteError(ValueError):
    """A loss, weights or scores that are NaN or infinite; the training has failed."""


class StopNotFinite(L.Callback):
    """Stops a training as soon as its loss is not finite, before the step, with ``failed/`` in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._batch: Any = None
        self._generators: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        self._batch, self._generators = batch, generators()

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: Tensor) -> None:
        if not bool(loss.detach().isfinite()):
            raise NotFiniteError(
                f"The loss is {float(loss.detach()):g} at step {trainer.global_step}; {ADVICE}. The weights, the batch "
                f"and the generators before that step are in {self.folder / LEFT}."
            )

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, NotFiniteError):
            own = self.folder / LEFT / (f"rank-{trainer.global_rank}" if trainer.world_size > 1 else "")
            own.mkdir(parents=True, exist_ok=True)
            save_file(tensors_of(module.state_dict(), ""), own / "weights.safetensors")
            save_file(tensors_of(self._batch), own / "batch.safetensors")
            states = dict(self._generators)
            write_json(own / "generators.json", {"python": states.pop("python", None)})
            save_file(states, own / "generators.safetensors")
            fail(self.folder, str(exception), trainer.global_step)


def generators() -> dict[str, Any]:
    """The states of the global generators: torch's, numpy's (its 624 keys and the position), and Python's."""
    state: Any = np.random.get_state()
    found: dict[str, Any] = {
        "torch": torch.get_rng_state(), "python": random.getstate(),
        "numpy": torch.from_numpy(np.append(state[1].astype(np.int64), state[2])),
    }  # fmt: skip
    if torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def tensors_of(batch: Any, name: str = "batch") -> dict[str, Tensor]:
    """The tensors of a batch, which may be one, or a tuple, list or dict of them, on the CPU."""
    if isinstance(batch, Tensor):
        return {name: batch.detach().cpu().contiguous().clone()}
    parts = batch.items() if isinstance(batch, Mapping) else enumerate(batch) if isinstance(batch, list | tuple) else ()
    return {k: v for key, part in parts for k, v in tensors_of(part, f"{name}.{key}" if name else str(key)).items()}


def require_finite(folder: Path, what: str, values: Mapping[str, Tensor | float], step: int) -> None:
    """NotFiniteError naming those of ``values`` that are not finite, with ``failed.json`` in ``folder``."""
    bad = [name for name, value in values.items() if not bool(torch.as_tensor(value).isfinite().all())]
    if bad:
        sentence = f"After step {step} {what} are not finite ({', '.join(bad[:4])}); {ADVICE}."
        fail(folder, sentence, step)
        raise NotFiniteError(sentence)


def fail(folder: Path, sentence: str, step: int) -> None:
    """Note that the run in ``folder`` has failed; its checkpoints, which would lead there again, are removed."""
    write_json(folder / FAILED, {"status": "failed", "about": sentence, "step": step})
    remove_checkpoints(folder)


@contextmanager
def worth_keeping(folder: Path, keep: bool = True) -> Iterator[None]:
    """Make the run folder ``folder``; it goes again where nothing is left in it to keep, or with ``keep=False``.

    So an impossible setting, or a try (``trainer.fast_dev_run``), leaves no folder behind.
    """
    bare = not folder.exists() or all(path.name.startswith(LOCK) for path in folder.iterdir())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        keep = keep and any((folder / name).exists() for name in KEPT)
        if bare and not keep and node()[1] == 1:  # other nodes look there for what they are to do
            shutil.rmtree(folder, ignore_errors=True)


def in_part(trainer: L.Trainer, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What has kept a training from the whole of its epochs: settings, or ``stopped_early`` with how far it came."""
    found = {name: settings[name] for name in ("limit_train_batches", "overfit_batches") if settings.get(name)}
    if type(found.get("limit_train_batches")) is float and found["limit_train_batches"] == 1:
        del found["limit_train_batches"]
    done = trainer.fit_loop.total_batch_idx + 1
    planned = (trainer.max_epochs or 0) * trainer.num_training_batches
    endless = trainer.max_epochs in (None, -1)
    if endless or done < planned:
        if 0 < trainer.max_steps <= trainer.global_step:
            found["max_steps"] = trainer.max_steps
        elif settings.get("max_time"):
            found["max_time"] = settings["max_time"]
        elif not endless:
            found["stopped_early"] = f"after {done} of {planned} batches"
    return found


def begin_anew(folder: Path) -> None:
    """Clear away what a failed run has left, if this is one, and say so."""
    if failure(folder) is not None:
        print(f"{folder.name}: failed before, trained anew.", flush=True)
        (folder / FAILED).unlink()
        (folder / HISTORY).unlink(missing_ok=True)
        shutil.rmtree(folder / LEFT, ignore_errors=True)
