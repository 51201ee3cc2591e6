"""Reading pictures in worker processes that end in a sentence where they fail, and never in waiting.

PyTorch's workers hand tensors over in /dev/shm and say where by sockets. Where no socket can be opened, or /dev/shm is
small (64 MB in many containers), batches get lost, and who waits for them waits for ever. There they go through the
workers' pipes, which costs two copies.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from sae_lightning.data.errors import DataError
from sae_lightning.distributed.processes import without_sockets

SHARED = Path("/dev/shm")
AHEAD = 3  # batches a worker: two that are asked for, and one that is being used
_said: set[str] = set()


class PictureLoader(DataLoader):
    """A DataLoader of batches with at most ``batch_bytes`` of pixels; ``setting`` is the name of ``num_workers``.

    Says so where workers cannot hand batches over in shared memory, or cannot be. Raises DataError where one of them
    ends by itself or reads what is no picture.
    """

    def __init__(
        self, dataset: Dataset, batch_bytes: int, num_workers: int = 0, setting: str = "num_workers",
        collate_fn: Callable[[list], Any] = default_collate, **options: Any,
    ) -> None:  # fmt: skip
        self.setting, self.by_pipe = setting, False
        if num_workers and (fault := without_semaphores()):
            _say(f"Pictures are read by one process, as no other can be started: {fault}. See to /dev/shm.")
            num_workers = 0
            options.pop("persistent_workers", None)
        if num_workers and (fault := without_shared_memory(AHEAD * num_workers * batch_bytes)):
            _say(f"{setting}={num_workers} processes hand pictures over by pipes, which is slower: {fault}.")
            self.by_pipe = True
        super().__init__(dataset, num_workers=num_workers, collate_fn=Handover(collate_fn, self.by_pipe), **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            for batch in super().__iter__():
                yield as_tensors(batch) if self.by_pipe else batch
        except DataError as error:  # of a worker, with its traceback
            raise DataError(str(error).strip().splitlines()[-1].split("DataError: ")[-1]) from None
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise DataError(
                f"A process that reads pictures ended by itself ({str(error).split('. ')[0].rstrip('.')}). If memory "
                f"is short, lower {self.setting} or the batch size; {self.setting}=0 reads in the main process."
            ) from error


def pixel_bytes(image_size: int, images: int) -> int:
    """Of ``images`` as float32 with three channels."""
    return 12 * image_size**2 * images


class Handover:
    """``collate`` in a worker, whose batches must not be lost: as arrays where they go through a pipe."""

    def __init__(self, collate: Callable[[list], Any], by_pipe: bool) -> None:
        self.collate, self.by_pipe = collate, by_pipe

    def __call__(self, samples: list) -> Any:
        if get_worker_info() is not None:
            Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]
        batch = self.collate(samples)
        return as_arrays(batch) if self.by_pipe else batch


def without_shared_memory(needed: int) -> str | None:
    """Why workers cannot hand over so many bytes in shared memory; None where they can."""
    fault = without_sockets()
    if fault:
        return f"no socket can be opened in the folder of temporary files ({fault}); a shorter TMPDIR may help"
    free = shutil.disk_usage(SHARED).free if SHARED.is_dir() else needed
    if free < needed:
        return f"{SHARED} has {free / 1e6:,.0f} MB free, expected {needed / 1e6:,.0f} (docker run --shm-size)"
    return None


def without_semaphores() -> str | None:
    """Why processes cannot wait for each other here; None where they can."""
    try:
        multiprocessing.get_context().Lock()
    except OSError as error:
        return str(error)
    return None


def as_arrays(batch: Any) -> Any:
    """``batch`` with NumPy's arrays for tensors: these are pickled, those would go through shared memory."""
    return _mapped(batch, torch.Tensor, lambda tensor: tensor.numpy())


def as_tensors(batch: Any) -> Any:
    """``as_arrays`` undone."""
    return _mapped(batch, np.ndarray, torch.from_numpy)


def _mapped(batch: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    if isinstance(batch, kind):
        return change(batch)
    if isinstance(batch, tuple | list):
        return type(batch)(_mapped(part, kind, change) for part in batch)
    if isinstance(batch, dict):
        return {key: _mapped(part, kind, change) for key, part in batch.items()}
    return batch


def _end(error: BaseException, batch: Any) -> None:
    """In a worker that cannot hand over ``batch``: end, on which who waits for it hears."""
    print(f"A process that reads pictures cannot hand them over: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def _say(sentence: str) -> None:
    if sentence not in _said:
        _said.add(sentence)
        print(sentence, file=sys.stderr, flush=True)
