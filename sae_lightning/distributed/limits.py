"""Cores and memory that this job may use, which are often fewer than the machine has: ``cores``, ``free_memory``.

The least of what affinity (taskset, cpusets), control groups (containers, systemd, SLURM) and SLURM's own variables
allow. A group's limit binds all groups below it, so each is looked for on the whole way up to the root.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import torch

PROC, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def cores(proc: Path = PROC, cgroups: Path = CGROUPS, variables: Mapping[str, str] = os.environ) -> int:
    """Cores for this job, at least 1; a share of a core counts as a whole one."""
    affinity = getattr(os, "sched_getaffinity", None)
    found = [float(len(affinity(0)) if affinity else os.cpu_count() or 1)]
    for folder in groups("cpu", proc, cgroups):
        quota, period = (*_words(folder / "cpu.max"), "", "")[:2]  # version 2: "max 100000" or "150000 100000"
        if not quota:
            quota, period = (_word(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit() and int(period):  # neither max nor -1
            found.append(int(quota) / int(period))
    granted = _slurm("CPUS_PER_TASK", variables) or _slurm("CPUS_ON_NODE", variables)
    if granted:
        found.append(granted)
    return max(1, math.ceil(min(found)))


def free_memory(proc: Path = PROC, cgroups: Path = CGROUPS, variables: Mapping[str, str] = os.environ) -> int:
    """Bytes that this job may still take, at least 0."""
    found = [psutil.virtual_memory().available]
    for folder in groups("memory", proc, cgroups):
        v2 = (folder / "memory.max").is_file()
        names = ("memory.max", "memory.current") if v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = (_word(folder / name) for name in names)
        if limit.isdigit() and used.isdigit():
            found.append(int(limit) - int(used) + _reclaimable(folder / "memory.stat"))
    granted = _slurm("MEM_PER_NODE", variables)  # MiB
    if not granted:
        granted = _slurm("MEM_PER_CPU", variables) * _slurm("CPUS_ON_NODE", variables)
    if granted:
        found.append((granted << 20) - _held())
    return max(0, min(found))


def use_allowed_cores() -> None:
    """Let PyTorch compute with no more threads than there are ``cores``; it sees affinity, but no control group."""
    torch.set_num_threads(min(torch.get_num_threads(), cores()))


def groups(controller: str, proc: Path = PROC, cgroups: Path = CGROUPS) -> Iterator[Path]:
    """Folders of this process's control groups that bind ``controller``, from its own up to the root."""
    try:
        lines = proc.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        own = (names, controller) if names else ("unified",)  # version 1 mounts each controller, 2 all as one
        root = next((cgroups / name for name in own if (cgroups / name).is_dir()), cgroups)
        inside = Path(path.strip("/"))
        for part in (inside, *inside.parents):  # in a container the path may be the host's: then only the root is there
            if ".." not in part.parts and (root / part).is_dir():
                yield root / part


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []


def _word(path: Path) -> str:
    return next(iter(_words(path)), "")


def _slurm(name: str, variables: Mapping[str, str]) -> int:
    """A number that SLURM set; 0 where it is not there, for all there is, or none."""
    found = re.match(r"\d+", variables.get(f"SLURM_{name}", ""))
    return int(found[0]) if found else 0


def _reclaimable(stat: Path) -> int:
    """Bytes of files that the kernel only keeps for the case that they are read again."""
    words = _words(stat)
    rows = dict(zip(words[::2], words[1::2], strict=False))
    return int(rows.get("total_inactive_file", rows.get("inactive_file", 0)))


def _held() -> int:
    """Resident bytes of this process and those that it started."""
    here = psutil.Process()
    total = 0
    for process in (here, *here.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total
