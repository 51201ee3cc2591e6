"""Starting the ranks of one job from its own resolved config.

Lightning starts further ranks by running ``sys.argv`` again, which under Hydra's ``-m`` would start the whole sweep in
every rank. Here ranks are processes that call a function with the config that the job has already resolved
(``distributed/processes.py``). They have torchrun's environment, so that Lightning starts nothing itself.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch.distributed import TCPStore

from sae_lightning.distributed.limits import cores
from sae_lightning.distributed.processes import Processes, run_together
from sae_lightning.distributed.stopping import FLAG, STEPS, Preempted, in_training, stop_on_signals, stop_requested
from sae_lightning.files import write_json

RENDEZVOUS = "rendezvous.json"

OVER = "over"


def node() -> tuple[int, int]:
    """Index of this node in its SLURM step and how many there are; (0, 1) elsewhere."""
    return int(os.environ.get("SLURM_NODEID", 0)), int(os.environ.get("SLURM_STEP_NUM_NODES", 1))


def check_tasks(cfg: DictConfig) -> None:
    """ValueError unless the job's nodes are those that the config asks for, with one task on each."""
    tasks, (_, nodes) = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)), node()
    wanted = int(cfg.trainer.get("num_nodes", 1))
    if tasks > nodes:
        raise ValueError(
            f"This SLURM job has {tasks} tasks on {nodes} node(s), expected one on each: it starts the ranks of "
            "trainer.devices itself. Set hydra.launcher.tasks_per_node=1, and cpus_per_task for all ranks together."
        )
    if wanted != nodes:
        raise ValueError(
            f"trainer.num_nodes={wanted}, but this job runs on {nodes}: set trainer.num_nodes and "
            "hydra.launcher.nodes to the same number (hydra/launcher=slurm_ddp does)."
        )


@contextmanager
def as_first_node(folder: Path) -> Iterator[None]:
    """What the first node does with a run; on leaving, the others hear that it is over."""
    try:
        yield
    finally:
        if node()[1] > 1:
            _publish(folder, {"state": OVER})


def publish_rendezvous(folder: Path) -> tuple[TCPStore, str]:
    """On the first node: let the others join; returns the store that all ranks meet at, and its address."""
    address = os.environ.get("SLURMD_NODENAME", "")
    try:
        socket.getaddrinfo(address, None)
    except OSError:
        address = ""
    address = os.environ.get("MASTER_ADDR") or address or socket.gethostname()
    store = TCPStore(address, int(os.environ.get("MASTER_PORT", 0)), is_master=True, wait_for_workers=False)
    _publish(folder, {"state": "meeting", "address": address, "port": store.port})
    return store, address


def await_rendezvous(folder: Path) -> tuple[str, int] | None:
    """On a further node: wait for the first one's word; None when there is nothing to do."""
    while True:
        try:
            found = json.loads((folder / RENDEZVOUS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        if found.get("job") == _attempt():
            return None if found["state"] == OVER else (found["address"], found["port"])
        time.sleep(0.5)


def _attempt() -> str:
    """What tells this start of this job from all others."""
    return "-".join(os.environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))


def _publish(folder: Path, what: dict[str, str | int]) -> None:
    write_json(folder / RENDEZVOUS, {"job": _attempt(), **what})


GRACE = 90.0  # seconds that ranks have to stop by themselves when a signal asks for it

GOODBYE = 60.0  # seconds that the first node waits for the others, whose ranks may still speak with its store


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


def on_gpu(cfg: DictConfig) -> bool:
    """Whether ``cfg`` trains on CUDA devices."""
    return torch.cuda.is_available() and str(cfg.trainer.accelerator) in ("auto", "gpu", "cuda")


def launch_ranks(
    cfg: DictConfig, folder: Path, work: Callable[[DictConfig, Path], object], count: int | None = None,
    resolve: bool = True,
) -> None:  # fmt: skip
    """Call ``work(cfg, folder)`` in ``count`` processes on each node, by default ``n_ranks(cfg)``.

    ``work`` is a function of a module. Without ``resolve`` the config's interpolations stay as they are. Within
    ``stop_on_signals``, raises Preempted when a signal has stopped the ranks. RuntimeError with the ranks' errors when
    a process fails, all others then stopped; whatever ends this process ends them too.
    """
    index, nodes = node()
    count = n_ranks(cfg) if count is None else count
    given = OmegaConf.create(OmegaConf.to_container(cfg, resolve=resolve))
    with tempfile.TemporaryDirectory(prefix="sae-lightning-") as own, _rendezvous(folder) as where:
        if where is None:
            return
        stop = Path(own) / "stop"
        common = dict(os.environ) | where | {FLAG: str(stop)}
        if "SLURM_CPUS_PER_TASK" in common or "OMP_NUM_THREADS" not in common:
            common["OMP_NUM_THREADS"] = str(max(1, cores() // count))
        variables = [common | _place(local, count, index, nodes) for local in range(count)]
        with run_together(_rank, [(work, given, folder)] * count, variables) as ranks:
            _watch(ranks, stop)
            failures = ranks.failures()
        steps = Path(f"{stop}{STEPS}").read_text(encoding="utf-8").split() if Path(f"{stop}{STEPS}").is_file() else []
    signum = stop_requested()
    if signum and all(said == f"ended by {signal.Signals(signum).name}" for said in failures.values()):
        raise Preempted(signum, *map(int, steps))
    if failures:
        said = "; ".join(f"rank {index * count + local}: {reason}" for local, reason in failures.items())
        raise RuntimeError(
            f"{folder.name}: one of its {count * nodes} ranks failed ({said}); its traceback is "
            "above, or in this job's log. The same line goes on from the last checkpoint."
        )


def _rank(work: Callable[[DictConfig, Path], object], cfg: DictConfig, folder: Path) -> None:
    with stop_on_signals(folder.name, in_rank=True):
        work(cfg, folder)


def _place(local: int, count: int, index: int, nodes: int) -> dict[str, str]:
    """What torchrun's environment says to rank ``local`` of ``count`` on node ``index`` of ``nodes``."""
    numbers = {
        "RANK": index * count + local, "LOCAL_RANK": local, "GROUP_RANK": index, "WORLD_SIZE": nodes * count,
        "LOCAL_WORLD_SIZE": count, "GROUP_WORLD_SIZE": nodes, "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
    }  # fmt: skip
    return {name: str(number) for name, number in numbers.items()}


@contextmanager
def _rendezvous(folder: Path) -> Iterator[dict[str, str] | None]:
    """Where all ranks meet, for their environment: a store that the first node serves while inside.

    None on a further node where there is nothing to do.
    """
    index, nodes = node()
    server = None
    if nodes == 1:
        address = "127.0.0.1"
        server = torch.distributed.TCPStore(address, 0, is_master=True, wait_for_workers=False)
    elif index == 0:
        server, address = publish_rendezvous(folder)
    else:
        met = await_rendezvous(folder)
        if met is None:
            yield None
            return
        address, port = met
        server = torch.distributed.TCPStore(address, port, is_master=False, timeout=timedelta(minutes=5))
    try:
        yield {
            "MASTER_ADDR": address, "MASTER_PORT": str(server.port), "TORCHELASTIC_RUN_ID": folder.name,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip
    finally:
        _part_from(server, index, nodes)


def _part_from(store: torch.distributed.TCPStore, index: int, nodes: int) -> None:
    """Let the first node serve its store until the others have ended, as long as ``GOODBYE`` at most."""
    if nodes == 1:
        return
    try:
        gone = store.add("nodes gone", 1)
        deadline = time.monotonic() + GOODBYE
        while index == 0 and gone < nodes and time.monotonic() < deadline:
            time.sleep(0.2)
            gone = store.add("nodes gone", 0)
    except RuntimeError:  # the first node is gone
        return


def _watch(ranks: Processes, stop: Path) -> None:
    """Wait for the ranks to end, and ask them to with the file ``stop`` where this process is asked."""
    deadline = float("inf")
    with in_training():
        while not ranks.ended(0.2) and time.monotonic() < deadline:
            if stop_requested() and not stop.exists():
                stop.touch()
                deadline = time.monotonic() + GRACE
