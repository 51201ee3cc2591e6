"""Starting the ranks of one job from its own resolved config.

Lightning starts further ranks by running ``sys.argv`` again, which under Hydra's ``-m`` would start the
whole sweep in every rank. Here torchrun starts a module, by default ``sae_lightning.training.run``, on the config
that the job has already resolved; Lightning finds its environment and starts nothing itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf


def wants_ranks(cfg: DictConfig) -> bool:
    """Whether the config asks for more than one process on this machine."""
    return n_ranks(cfg) > 1


def n_ranks(cfg: DictConfig) -> int:
    """Processes for ``trainer.devices``: a number, a list of GPU indices, or -1 / auto for all GPUs."""
    devices, accelerator = cfg.trainer.devices, str(cfg.trainer.accelerator)
    gpus = torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") else 0
    if devices in (-1, "-1", "auto"):
        return max(1, gpus)
    if isinstance(devices, int | str):
        return int(devices)
    return len(devices)


def job() -> tuple[DictConfig, Path]:
    """The config and folder that ``launch_ranks`` gave this rank on its command line."""
    config, folder = sys.argv[1:3]
    cfg = OmegaConf.load(config)
    assert isinstance(cfg, DictConfig)
    return cfg, Path(folder)


def launch_ranks(
    cfg: DictConfig, folder: Path, module: str = "sae_lightning.training.run", count: int | None = None,
    resolve: bool = True,
) -> None:  # fmt: skip
    """Run ``module`` on config and folder in ``count`` processes, by default ``n_ranks(cfg)``.

    Without ``resolve`` the config's interpolations stay as they are. RuntimeError when a process fails, all others
    then stopped.
    """
    config = folder / "resolved.yaml"
    OmegaConf.save(cfg, config, resolve=resolve)
    count = n_ranks(cfg) if count is None else count
    environment = dict(os.environ)
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (root, environment.get("PYTHONPATH")) if p)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}",
        "-m", module, str(config), str(folder),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            f"{folder.name}: one of its {count} ranks failed (exit {done.returncode}); its error is above. "
            "The same command resumes from the last checkpoint."
        )
