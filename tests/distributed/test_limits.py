"""Cores and memory are those that the job may use, whatever the machine has."""

from __future__ import annotations

import os

import psutil
import pytest
import torch

from sae_lightning.distributed.limits import cores, free_memory, groups, use_allowed_cores
from sae_lightning.features.extraction import Extraction
from sae_lightning.finetuning.data import workers
from sae_lightning.training.packed import SHARE, free_bytes, workers_of

GIB = 1 << 30


@pytest.fixture
def job(tmp_path, monkeypatch):
    """``job(lines, files)``: what /proc and /sys say of a job on a machine of 64 cores and 512 GiB that is idle."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    memory = psutil.virtual_memory()._replace(available=512 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)

    def make(lines: str = "0::/", files: dict[str, object] | None = None, **slurm: str) -> tuple:
        (tmp_path / "proc").write_text(lines)
        for name, content in (files or {}).items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")
        return tmp_path / "proc", tmp_path / "cgroup", {f"SLURM_{name}": value for name, value in slurm.items()}

    return make


V1 = "9:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n1:name=systemd:/docker/a"


@pytest.mark.parametrize(
    ("lines", "files", "slurm", "expected"),
    [
        ("0::/", {}, {}, 64),
        ("0::/", {"cpu.max": "max 100000"}, {}, 64),
        ("0::/", {"cpu.max": "200000 100000"}, {}, 2),  # docker --cpus=2, with its own group as the root
        ("0::/", {"cpu.max": "150000 100000"}, {}, 2),
        ("0::/", {"cpu.max": "10000 100000"}, {}, 1),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, {}, 3),  # of the group above
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "800000 100000"}, {}, 3),
        ("0::/not/here", {"cpu.max": "400000 100000"}, {}, 4),  # the host's path, seen in a container
        ("0::/../other", {"cpu.max": "400000 100000"}, {}, 4),
        (V1, {f"cpu,cpuacct/docker/a/cpu.cfs_{n}_us": v for n, v in (("quota", 500000), ("period", 100000))}, {}, 5),
        (V1, {"cpu/cpu.cfs_quota_us": 500000, "cpu/cpu.cfs_period_us": 100000}, {}, 5),
        (V1, {"cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000}, {}, 64),
        ("0::/", {}, {"CPUS_PER_TASK": "6", "CPUS_ON_NODE": "12"}, 6),
        ("0::/", {}, {"CPUS_ON_NODE": "12"}, 12),
        ("0::/", {"cpu.max": "400000 100000"}, {"CPUS_ON_NODE": "12"}, 4),
    ],
)  # fmt: skip
def test_cores_are_the_least_that_anything_allows(lines, files, slurm, expected, job):
    assert cores(*job(lines, files, **slurm)) == expected


def test_affinity_allows_fewer_cores(job, monkeypatch):
    given = job("0::/", {"cpu.max": "800000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 17})
    assert cores(*given) == 2


@pytest.mark.parametrize(
    ("lines", "files", "slurm", "expected"),
    [
        ("0::/", {}, {}, 512),
        ("0::/", {"memory.max": "max", "memory.current": 5 * GIB}, {}, 512),
        ("0::/", {"memory.max": 8 * GIB, "memory.current": 5 * GIB}, {}, 3),
        ("0::/", {"memory.max": 8 * GIB, "memory.current": 5 * GIB,
                  "memory.stat": f"anon {GIB}\ninactive_file {2 * GIB}"}, {}, 5),  # what is only cached is free
        ("0::/a/b", {"a/memory.max": 8 * GIB, "a/memory.current": 7 * GIB, "a/b/memory.max": 6 * GIB,
                     "a/b/memory.current": GIB}, {}, 1),
        ("0::/", {"memory.max": 8 * GIB, "memory.current": 9 * GIB}, {}, 0),
        (V1, {f"memory/docker/a/memory.{n}_in_bytes": v for n, v in (("limit", 8 * GIB), ("usage", GIB))}, {}, 7),
        (V1, {f"memory/docker/a/memory.{n}_in_bytes": v for n, v in (("limit", 2**63), ("usage", 9))}, {}, 512),
    ],
)  # fmt: skip
def test_free_memory_is_the_least_that_anything_allows(lines, files, slurm, expected, job):
    assert free_memory(*job(lines, files, **slurm)) == expected * GIB


@pytest.mark.parametrize(
    ("slurm", "granted"),
    [
        ({"MEM_PER_NODE": "16384"}, 16),
        ({"MEM_PER_CPU": "2048", "CPUS_ON_NODE": "4"}, 8),
        ({"MEM_PER_NODE": "0"}, 512),  # all there is
    ],
)
def test_slurm_grants_memory_of_which_the_job_holds_some(slurm, granted, job):
    assert free_memory(*job(**slurm)) == pytest.approx(granted * GIB, abs=4 * GIB)


def test_nothing_is_known_without_control_groups(tmp_path):
    assert list(groups("cpu", tmp_path / "nothing", tmp_path)) == []


def test_workers_threads_and_packs_keep_to_them(config, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr("sae_lightning.training.packed.free_memory", lambda: 10 * GIB)
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    assert [Extraction(sharing=n).workers(224) for n in (1, 2, 8)] == [2, 1, 1]
    assert workers(224, None) == 2
    assert workers_of(config(), 12) == 3
    assert free_bytes(config()) == int(SHARE * 10 * GIB)
    use_allowed_cores()
    assert chosen == [3]
