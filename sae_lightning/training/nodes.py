"""The nodes of a SLURM job, one task on each: the first leads, the others join its ranks.

They share nothing but the file system. In the run folder the first node says where its ranks meet, or that there is
nothing (more) to do.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig
from torch.distributed import TCPStore

MEETING = "meeting.json"
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
def leading(folder: Path) -> Iterator[None]:
    """What the first node does with a run; on leaving, the others hear that it is over."""
    try:
        yield
    finally:
        if node()[1] > 1:
            _post(folder, {"state": OVER})


def call_meeting(folder: Path) -> tuple[TCPStore, str]:
    """On the first node: let the others join; returns the store that all ranks meet at, and its address."""
    address = os.environ.get("SLURMD_NODENAME", "")
    try:
        socket.getaddrinfo(address, None)
    except OSError:
        address = ""
    address = os.environ.get("MASTER_ADDR") or address or socket.gethostname()
    store = TCPStore(address, int(os.environ.get("MASTER_PORT", 0)), is_master=True, wait_for_workers=False)
    _post(folder, {"state": "meeting", "address": address, "port": store.port})
    return store, address


def find_meeting(folder: Path) -> tuple[str, int] | None:
    """On a further node: wait for the first one's word; None when there is nothing to do."""
    while True:
        try:
            found = json.loads((folder / MEETING).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        if found.get("job") == _attempt():
            return None if found["state"] == OVER else (found["address"], found["port"])
        time.sleep(0.5)


def _attempt() -> str:
    """What tells this start of this job from all others."""
    return "-".join(os.environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))


def _post(folder: Path, what: dict[str, str | int]) -> None:
    partial = folder / f"{MEETING}.partial"
    partial.write_text(json.dumps({"job": _attempt(), **what}), encoding="utf-8")
    partial.replace(folder / MEETING)
