"""Starting the ranks of one job from its own resolved config.

Lightning starts further ranks by running ``sys.argv`` again, which under Hydra's ``-m`` would start the
whole sweep in every rank. Here torchrun starts a module, by default ``sae_lightning.training.run``, on the config
that the job has already resolved; Lightning finds its environment and starts nothing itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from omegaconf import DictConfig, OmegaConf

from sae_lightning.limits import cores
from sae_lightning.training import agent
from sae_lightning.training.agent import FAILURES
from sae_lightning.training.nodes import call_meeting, find_meeting, node
from sae_lightning.training.preempt import FLAG, STEPS, Preempted, asked, working

GRACE = 90.0  # seconds that ranks have to stop by themselves when a signal asks for it
SHUTDOWN = 40.0  # seconds that torchrun has to end its ranks, of which it gives them 30


def wants_ranks(cfg: DictConfig) -> bool:
    """Whether the config asks for more than one process."""
    return n_ranks(cfg) * int(cfg.trainer.get("num_nodes", 1)) > 1


def n_ranks(cfg: DictConfig) -> int:
    """Processes a node for ``trainer.devices``: a number, a list of GPU indices, or -1 / auto for all GPUs."""
    devices, accelerator = cfg.trainer.devices, str(cfg.trainer.accelerator)
    gpus = torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") else 0
    if devices in (-1, "-1", "auto"):
        return max(1, gpus)
    if isinstance(devices, int | str):
        return int(devices)
    return len(devices)


def environment() -> list[Any]:
    """Lightning's plugins that keep it from taking a SLURM job for its own: torchrun's ranks, or this process alone."""
    return [] if torch.distributed.is_torchelastic_launched() else [LightningEnvironment()]


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
    """Run ``module`` on config and folder in ``count`` processes on each node, by default ``n_ranks(cfg)``.

    Without ``resolve`` the config's interpolations stay as they are. Within ``heeding``, raises Preempted when a
    signal has stopped the ranks. RuntimeError with the ranks' errors when a process fails, all others then stopped;
    whatever ends this process ends them too.
    """
    config, (index, nodes) = folder / "resolved.yaml", node()
    count = n_ranks(cfg) if count is None else count
    if index == 0:
        OmegaConf.save(cfg, config, resolve=resolve)
    where = ["--standalone", "--local-addr=127.0.0.1"]  # this host's own name may not resolve
    if nodes > 1:
        meeting = call_meeting(folder) if index == 0 else find_meeting(folder)
        if meeting is None:
            return
        address, port = meeting
        where = [f"--nnodes={nodes}", f"--node-rank={index}", f"--master-addr={address}", f"--master-port={port}"]
    with tempfile.TemporaryDirectory() as own:
        stop, failures = Path(own) / "stop", Path(own) / "failures"
        variables = dict(os.environ) | {FLAG: str(stop), FAILURES: str(failures)}
        root = str(Path(__file__).resolve().parents[2])
        variables["PYTHONPATH"] = os.pathsep.join(p for p in (root, variables.get("PYTHONPATH")) if p)
        if "SLURM_CPUS_PER_TASK" in variables or "OMP_NUM_THREADS" not in variables:
            variables["OMP_NUM_THREADS"] = str(max(1, cores() // count))
        command = [
            sys.executable, "-P", agent.__file__, *where, f"--nproc-per-node={count}",
            "-m", "sae_lightning.training.rank", module, str(config), str(folder),
        ]  # fmt: skip
        code = _watch(subprocess.Popen(command, env=variables), stop)
        said = failures.read_text() if failures.is_file() else ""
        steps = Path(f"{stop}{STEPS}").read_text().split() if Path(f"{stop}{STEPS}").is_file() else []
    signum = asked()
    if signum and not said:
        raise Preempted(signum, *map(int, steps))
    if code != 0:
        raise RuntimeError(
            f"{folder.name}: one of its {count * nodes} ranks failed ({said or f'exit {code}'}); its traceback is "
            "above, or in this job's log. The same line goes on from the last checkpoint."
        )


def _watch(torchrun: subprocess.Popen[bytes], stop: Path) -> int:
    """Wait for torchrun, asking its ranks to stop with the file ``stop`` where this process is asked; its status."""
    deadline = float("inf")
    try:
        with working():
            while torchrun.poll() is None and time.monotonic() < deadline:
                if asked() and not stop.exists():
                    stop.touch()
                    deadline = time.monotonic() + GRACE
                try:
                    torchrun.wait(0.2)
                except subprocess.TimeoutExpired:
                    continue
    finally:
        _end(torchrun)
    return torchrun.returncode


def _end(torchrun: subprocess.Popen[bytes]) -> None:
    """Let torchrun end its ranks; they go with it if it does not."""
    if torchrun.poll() is None:
        torchrun.terminate()
        try:
            torchrun.wait(SHUTDOWN)
        except subprocess.TimeoutExpired:
            torchrun.kill()
            torchrun.wait()
