"""A closed terminal and Ctrl-C end a training as SLURM's signals do: at a checkpoint, with a sentence."""

from __future__ import annotations

import os
import pty
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sae_lightning.distributed import launch, stopping
from sae_lightning.distributed.processes import run_together
from sae_lightning.distributed.stopping import STEPS, Preempted, in_training, stop_on_signals
from sae_lightning.finetuning.fit import finetune
from sae_lightning.runs.state import last_checkpoint
from sae_lightning.training.fit import train
from sae_lightning.training.packed import train_packed
from tests.finetuning.conftest import settings  # noqa: F401


@pytest.fixture(autouse=True)
def _at_a_terminal():
    """Also where the tests were started in the background, by nohup say, and so ignore its signals."""
    before = [signal.signal(number, signal.SIG_DFL) for number in stopping.TERMINAL]
    yield
    for number, handler in zip(stopping.TERMINAL, before, strict=True):
        signal.signal(number, handler)


def sent(name: str, at: int) -> str:
    return f"+callbacks.signal={{_target_: tests.training.crash.Signal, at: {at}, name: {name}}}"


def checkpoint_step(run: Path) -> int:
    return torch.load(last_checkpoint(run), weights_only=True)["global_step"]


def status_of(work) -> int:
    """The exit status of a process forked off this one that does ``work``, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(("name", "said"), [("SIGHUP", "SIGHUP"), ("SIGINT", "Ctrl-C")])
def test_a_run_stops_at_a_checkpoint_and_says_where(name, said, config, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train(config(sent(name, 2)))
    assert stopped.value.code == 128 + getattr(signal, name)
    assert f"stopped at step 3 by {said}; the same line goes on from there" in capsys.readouterr().out
    (run,) = (tmp_path / "runs").iterdir()
    assert checkpoint_step(run) == 3


def test_a_pack_stops_at_checkpoints_and_says_where(config, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_packed([config("k=4", "pack.workers=1"), config("k=8", "pack.workers=1", sent("SIGHUP", 2))])
    assert stopped.value.code == 128 + signal.SIGHUP
    steps = sorted({checkpoint_step(run) for run in (tmp_path / "runs").iterdir()})
    assert len(list((tmp_path / "runs").iterdir())) == 2
    at = " and ".join(map(str, steps))
    assert f"2 runs side by side: stopped at step {at} by SIGHUP; the same line" in capsys.readouterr().out


def test_a_fine_tuning_stops_at_a_checkpoint_and_goes_on(settings, tmp_path, capsys):  # noqa: F811
    with pytest.raises(SystemExit) as stopped:
        finetune(settings("epochs=2", sent("SIGINT", 1)))
    assert stopped.value.code == 128 + signal.SIGINT
    assert "stopped at step 2 by Ctrl-C" in capsys.readouterr().out
    (run,) = (tmp_path / "runs").iterdir()
    assert checkpoint_step(run) == 2
    finetune(settings("epochs=2"))
    assert "resuming from its last checkpoint" in capsys.readouterr().out


def test_what_is_ignored_stays_ignored():
    """nohup, and a shell's background jobs."""
    before = [signal.signal(number, signal.SIG_IGN) for number in stopping.TERMINAL]
    try:
        with stop_on_signals("a run"), in_training():
            for number in stopping.TERMINAL:
                signal.raise_signal(number)
            assert stopping.stop_requested() is None
        assert [signal.getsignal(number) for number in stopping.TERMINAL] == [signal.SIG_IGN] * 2
    finally:
        for number, handler in zip(stopping.TERMINAL, before, strict=True):
            signal.signal(number, handler)


def test_a_second_ctrl_c_stops_at_once(capfd):
    with stop_on_signals("a run"), in_training():
        signal.raise_signal(signal.SIGINT)
        assert stopping.stop_requested() == signal.SIGINT
        assert "Once more stops at once" in capfd.readouterr().err
        with pytest.raises(SystemExit) as stopped:
            signal.raise_signal(signal.SIGINT)
    assert stopped.value.code == 128 + signal.SIGINT
    assert "the same line goes on from the last checkpoint" in capfd.readouterr().out


def test_workers_leave_the_terminal_s_signals_to_their_parent():
    with stop_on_signals("a run"):
        assert status_of(lambda: [signal.raise_signal(number) for number in stopping.TERMINAL]) == 0
        assert status_of(lambda: signal.raise_signal(signal.SIGTERM)) == -signal.SIGTERM


def test_progress_goes_nowhere_where_the_terminal_is_gone():
    """The next line of a bar would be an error before the checkpoint is written."""
    terminal, slave = pty.openpty()
    os.close(terminal)

    def work() -> None:
        os.dup2(slave, 1)
        with pytest.raises(OSError, match="Input/output error"):
            os.write(1, b"progress")
        with stop_on_signals("a run"), in_training():
            signal.raise_signal(signal.SIGHUP)
            os.write(1, b"progress")
            assert stopping.stop_requested() == signal.SIGHUP

    assert status_of(work) == 0
    os.close(slave)


class Ranks:
    """Instead of ranks: a terminal is closed while they work, and they end where they are asked to stop."""

    def __init__(self, stop: Path) -> None:
        self.stop = stop

    def ended(self, seconds: float) -> bool:
        signal.raise_signal(signal.SIGHUP)
        if self.stop.exists():
            Path(f"{self.stop}{STEPS}").write_text("7\n7\n")
        return self.stop.exists()

    def failures(self) -> dict[int, str]:
        return {}


def test_ranks_are_asked_to_stop_and_meet_on_the_loopback_address(config, tmp_path, monkeypatch):
    """This host's own name need not resolve."""
    seen = []

    @contextmanager
    def together(work: Callable, arguments: list, variables: list[dict[str, str]]) -> Iterator[Ranks]:
        seen.extend(variables)
        yield Ranks(Path(variables[0][stopping.FLAG]))

    monkeypatch.setattr(launch, "run_together", together)
    with stop_on_signals("a run"), pytest.raises(Preempted) as stopped:
        launch.launch_ranks(config("trainer.devices=2"), tmp_path, print)
    assert (stopped.value.signum, stopped.value.steps) == (signal.SIGHUP, (7, 7))
    assert [place["MASTER_ADDR"] for place in seen] == ["127.0.0.1"] * 2


def hit(log: Path) -> None:
    """What a rank does when the terminal is closed, and at Ctrl-C."""
    for number in stopping.TERMINAL:
        signal.raise_signal(number)
    log.touch()


def test_ranks_leave_the_terminal_s_signals_to_the_job(tmp_path):
    with run_together(hit, [(tmp_path / "log",)], [dict(os.environ)]) as processes:
        while not processes.ended(1):
            pass
        assert processes.failures() == {}
    assert (tmp_path / "log").exists()
