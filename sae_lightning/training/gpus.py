"""One run a GPU on one machine, for ``hydra/launcher=gpus``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from filelock import Timeout
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict

from sae_lightning.locks import Lock

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get(VISIBLE)
    if named is None:
        import torch

        return [str(i) for i in range(torch.cuda.device_count())]
    return [name.strip() for name in named.split(",") if name.strip()]


class OneGPU(Callback):
    """Hydra callback: a sweep starts as many processes as there are GPUs, and each shows its jobs one of them.

    A process takes its GPU at its first job and keeps it until it ends, by a lock file in the sweep's folder.
    RuntimeError when there are more processes than GPUs. Without GPUs it changes nothing.
    """

    def __init__(self) -> None:
        self.gpus: list[str] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.gpus = visible_gpus()
        if self.gpus and config.hydra.launcher.n_jobs == -1:
            with open_dict(config):
                config.hydra.launcher.n_jobs = len(self.gpus)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if self.gpus:
            os.environ[VISIBLE] = take(self.gpus, Path(config.hydra.sweep.dir) / ".gpus")


_taken: list[tuple[str, Lock]] = []  # by this process


def take(gpus: list[str], folder: Path) -> str:
    """One of ``gpus`` that no other process which uses ``folder`` has; the same again in later calls."""
    if _taken:
        return _taken[0][0]
    folder.mkdir(parents=True, exist_ok=True)
    for gpu in gpus:
        lock = Lock(folder / f"{gpu.replace('/', '-')}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        _taken.append((gpu, lock))
        return gpu
    raise RuntimeError(
        f"All {len(gpus)} GPUs ({', '.join(gpus)}) are taken by other processes of this sweep; lower "
        "hydra.launcher.n_jobs to the number of GPUs."
    )
