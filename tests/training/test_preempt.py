"""A training that is asked to stop leaves a checkpoint, and goes on to the same weights."""

import csv
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from sae_lightning.distributed import stopping
from sae_lightning.distributed.stopping import Preempted, exit_for_signal, in_training, stop_on_signals
from sae_lightning.saes import SAE
from sae_lightning.training.fit import train
from tests.processes import HANG, Command, wait_for

STEPS = 8  # an epoch: 32 pictures of 64 tokens in batches of 256


def equal(one: Path, two: Path) -> bool:
    first, second = SAE.load(one).state_dict(), SAE.load(two).state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "at"), [("SIGUSR1", 0), ("SIGUSR2", STEPS - 1), ("SIGTERM", STEPS + 2), ("SIGUSR1", 3 * STEPS - 1)]
)
def test_a_run_stopped_in_any_step_goes_on_to_the_same_weights(name, at, config, alone, tmp_path, capsys):
    """Within an epoch, at an epoch's last step, and at the last of all; the history has no gap and nothing twice."""
    whole = alone()
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    with pytest.raises(SystemExit) as stopped:
        train(config(f"+callbacks.signal={{_target_: tests.training.crash.Signal, at: {at}, name: {name}}}"))
    assert stopped.value.code == 128 + getattr(signal, name)
    assert f"stopped at step {at + 1} by {name}; the same line goes on" in capsys.readouterr().out
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
    (run,) = (tmp_path / "runs").iterdir()
    assert not (run / "result.json").exists()
    done = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert done == at + 1
    folder = train(config())
    assert "resuming" in capsys.readouterr().out
    assert equal(whole, folder)
    rows = [list(csv.DictReader((f / "history.csv").open())) for f in (whole, folder)]
    assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]]


def test_a_signal_outside_of_a_training_ends_the_job_at_once():
    with pytest.raises(SystemExit) as stopped, stop_on_signals("a run"):
        signal.raise_signal(signal.SIGUSR2)
    assert stopped.value.code == 128 + signal.SIGUSR2


def test_a_training_in_another_thread_hears_the_signal_of_the_main_thread():
    heard = []

    def run(ready: threading.Event) -> None:
        with in_training(), stop_on_signals("not the main thread, so nothing"):
            ready.set()
            while not stopping.stop_requested():
                time.sleep(0.01)
            heard.append(stopping.stop_requested())

    with stop_on_signals("a pack"):
        thread = threading.Thread(target=run, args=(ready := threading.Event(),))
        thread.start()
        ready.wait()
        os.kill(os.getpid(), signal.SIGUSR1)
        thread.join(HANG)
    assert heard == [signal.SIGUSR1]


@pytest.mark.parametrize(("signum", "listens"), [(signal.SIGUSR1, signal.SIGUSR2), (signal.SIGUSR2, signal.SIGUSR2)])
def test_either_warning_reaches_the_handler_of_submitit(signum, listens, monkeypatch):
    """That requeues the job, whichever of the two signals this cluster sends."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    got = []
    before = signal.signal(listens, lambda number, frame: got.append(number))
    try:
        with pytest.raises(SystemExit), stop_on_signals("a run"):
            raise Preempted(signum)
    finally:
        signal.signal(listens, before)
    assert got == [signum]


@pytest.mark.slow
def test_after_sigterm_a_slurm_job_waits_for_slurm_to_decide(monkeypatch):
    """SIGTERM may be from scancel: nothing is requeued, but a job that SLURM requeues must not end by itself."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setattr(stopping, "PATIENCE", 1.5)
    requeued, passed = [], []
    handlers = {signal.SIGUSR2: lambda *_: requeued.append(1), signal.SIGTERM: lambda *_: passed.append(1)}
    start = time.monotonic()
    with pytest.raises(SystemExit):
        exit_for_signal(signal.SIGTERM, "a run", handlers)
    assert time.monotonic() - start >= 1.5
    assert (requeued, passed) == ([], [1])


@pytest.mark.slow
def test_two_ranks_stop_at_one_step_and_go_on_to_the_same_weights(config, tmp_path):
    """The signal reaches this process alone, which has them stop; then the run goes on with two ranks, bit for bit."""
    two = ["trainer.devices=2", "trainer.max_epochs=8"]
    whole = train(config(*two, f"paths.runs={tmp_path / 'whole'}"))
    kill = f"+callbacks.signal={{_target_: tests.training.crash.Signal, at: 3, name: SIGUSR1, pid: {os.getpid()}}}"
    with pytest.raises(SystemExit) as stopped:
        train(config(*two, kill))
    assert stopped.value.code == 128 + signal.SIGUSR1
    (run,) = (tmp_path / "runs").iterdir()
    done = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 3 < done < 8 * STEPS
    assert equal(whole, train(config(*two)))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends processes with their parent")
def test_ranks_end_with_a_killed_job_and_leave_a_checkpoint(config, tmp_path):
    cfg, pids = config(), tmp_path / "pids"
    pids.mkdir()
    command = [
        "train.py", "data=folder", f"data.path={cfg.data.path}", "backbone=deit", "backbone.size=tiny",
        "k=8", "expansion=2", "batch_size=256", "trainer.accelerator=cpu", "dead_after=1000",
        "trainer.log_every_n_steps=2", f"paths.stores={cfg.paths.stores}", f"paths.runs={cfg.paths.runs}",
        "trainer.devices=2", f"hydra.run.dir={tmp_path / 'hydra'}", "trainer.max_epochs=500",
        f"+callbacks.signal={{_target_: tests.training.crash.Signal, at: 3, name: '', pids: {pids}}}",
    ]  # fmt: skip
    with Command(*command, cwd=tmp_path) as job:
        wait_for(lambda: len(list(pids.iterdir())) == 2 or not job.running)
        ranks = [int(path.name) for path in pids.iterdir()]
        assert len(ranks) == 2
        job.kill()
    wait_for(lambda: not any(alive(pid) for pid in ranks))
    (run,) = Path(cfg.paths.runs).iterdir()
    assert (run / "checkpoints" / "last.ckpt").is_file()
