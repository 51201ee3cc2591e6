"""Locks keep processes apart also where the file system has none, and nobody waits for the dead."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

import pytest
from filelock import Timeout

from sae_lightning import files
from sae_lightning.files import Lock, LockError, held
from sae_lightning.runs.state import state_of
from sae_lightning.training.fit import train


@pytest.fixture
def without(monkeypatch):
    """``without(code)``: from now on ``flock`` fails with this error."""

    def refuse(code: int) -> None:
        def flock(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(fcntl, "flock", flock)

    monkeypatch.setattr(files, "_without", set())
    return refuse


def elsewhere(work) -> int:
    """The id of a process forked off this one that does ``work`` as if on another node, and is then killed."""
    child = os.fork()
    if child == 0:
        socket.gethostname = lambda: "node-a"
        work()
        os._exit(0)
    return child


@pytest.mark.parametrize("code", sorted(files.MISSING))
def test_a_file_system_without_locks_gets_leases_and_a_sentence(code, without, tmp_path, capsys):
    without(code)
    with Lock(tmp_path / "a.lock"):
        said = capsys.readouterr().err
        assert f"The file system of {tmp_path} has no locks ({os.strerror(code)})" in said
        child = elsewhere(lambda: os._exit(0 if Lock(tmp_path / "a.lock").taken() else 1))
        assert os.waitpid(child, 0)[1] == 0
    with Lock(tmp_path / "a.lock"), Lock(tmp_path / "b.lock"):
        assert capsys.readouterr().err == ""  # it has been said


def test_another_node_s_dead_lock_is_named_and_passed_over(without, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(files, "LEASE", 0.5)
    without(errno.ENOSYS)
    child = elsewhere(Lock(tmp_path / ".lock").acquire)
    os.waitpid(child, 0)
    with pytest.raises(Timeout):
        Lock(tmp_path / ".lock").acquire(timeout=0)
    with held(tmp_path / ".lock", "training a run"):
        assert f"Process {child} on node-a is training a run; waiting for it." in capsys.readouterr().out


def test_a_living_holder_keeps_its_lease(without, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LEASE", 0.3)
    without(errno.ENOLCK)
    with Lock(tmp_path / ".lock"):
        child = elsewhere(lambda: refused(tmp_path / ".lock", 1.0))
        assert os.waitpid(child, 0)[1] == 0


def refused(path: Path, seconds: float) -> None:
    """End with 0 if the lock is not to be had for so long."""
    try:
        Lock(path).acquire(timeout=seconds)
    except Timeout:
        os._exit(0)
    os._exit(1)


def test_a_run_trains_without_locks(without, config):
    without(errno.ENOLCK)
    folder = train(config("trainer.max_epochs=1"))
    assert state_of(folder).state == "finished"


def test_a_lock_that_fails_otherwise_is_named(without, tmp_path):
    without(errno.EIO)
    with (
        pytest.raises(LockError, match=rf"{tmp_path}/\.lock cannot be locked: .*SAE_LIGHTNING_LOCKS=soft"),
        held(tmp_path / ".lock", "training"),
    ):
        pass


def test_the_way_to_lock_can_be_chosen(without, tmp_path, monkeypatch):
    without(errno.EIO)
    monkeypatch.setenv("SAE_LIGHTNING_LOCKS", "soft")
    with Lock(tmp_path / ".lock"):
        assert (tmp_path / ".lock.lease").exists()
        assert (tmp_path / ".lock").exists()
    monkeypatch.setenv("SAE_LIGHTNING_LOCKS", "none")
    with Lock(tmp_path / "x.lock"), Lock(tmp_path / "x.lock"):
        assert not (tmp_path / "x.lock").exists()
    monkeypatch.setenv("SAE_LIGHTNING_LOCKS", "fcntl")
    with pytest.raises(LockError, match="choose one of auto, soft, none"):
        Lock(tmp_path / ".lock").acquire()


def test_waiting_for_another_job_is_said_once(tmp_path, capsys):
    ready = tmp_path / "ready"

    def work() -> None:
        with Lock(tmp_path / ".lock"):
            ready.touch()
            time.sleep(0.6)

    child = elsewhere(work)
    while not ready.exists():
        time.sleep(0.01)
    with held(tmp_path / ".lock", "scoring a run"):
        assert capsys.readouterr().out == "Another job is scoring a run; waiting for it.\n"
    os.waitpid(child, 0)
