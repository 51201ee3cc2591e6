"""``make test-slurm``: sweeps, preemption, ranks, nodes and crashes on a real SLURM that this starts and stops.

    python -m experiments.slurm.test [NAME …]

Needs Debian's packages slurm-wlm and munge, and root. Prints a table of what passed; exits with 1 unless all did.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from experiments.slurm.cluster import PACKAGES, cluster, missing, said
from sae_lightning.saes import SAE

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 600.0  # seconds for any one thing


started: list[subprocess.Popen[str]] = []


class Sweep:
    """``train.py -m`` with small settings; runs go to ``work/NAME``, what it prints to ``work/NAME.log``."""

    def __init__(self, work: Path, name: str, *overrides: str, launcher: str = "slurm_cpu") -> None:
        self.work, self.runs = work, work / name
        slurm = ["hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=2", "hydra.launcher.timeout_min=30"]
        self.command = [
            sys.executable, "train.py", "-m", f"hydra/launcher={launcher}", "data=demo", "subset.images=200",
            "batch_size=512", "trainer.max_epochs=1", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false",
            "checkpoint.every_steps=4", f"paths.stores={work / 'stores'}", f"paths.runs={self.runs}",
            f"hydra.sweep.dir={work / 'sweeps' / name}", *(slurm if launcher.startswith("slurm") else []), *overrides,
        ]  # fmt: skip
        self.process: subprocess.Popen[str] | None = None
        self.log = work / f"{name}.log"
        self.jobs = work / "sweeps" / name / ".submitit"

    def start(self) -> Sweep:
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(self.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, text=True)
        started.append(self.process)
        return self

    def wait(self, fails: bool = False) -> str:
        """The text that it printed, its jobs' logs included."""
        assert self.process is not None
        until(lambda: self.process is not None and self.process.poll() is not None, "the sweep ends", self.say)
        assert (self.process.returncode != 0) == fails, f"exit {self.process.returncode}\n{self.say()}"
        return self.say()

    def say(self) -> str:
        logs = [self.log, *sorted(self.jobs.rglob("*.out")), *sorted(self.jobs.rglob("*.err"))]
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace', encoding='utf-8')}" for path in logs if path.is_file()
        )

    def weights(self) -> list[dict[str, torch.Tensor]]:
        """Of its finished runs, ordered by their size."""
        found = [SAE.load(p.parent).state_dict() for p in self.runs.glob("*/result.json")]
        return sorted(found, key=lambda state: state["W_dec"].numel())

    def devices(self) -> list[int]:
        """How many ranks finished each of its runs."""
        return [json.loads(p.read_text(encoding="utf-8"))["devices"] for p in self.runs.glob("*/result.json")]


def until(happened: Callable[[], object], what: str, why: Callable[[], str] = str) -> None:
    """Wait until ``happened``; requeued jobs, which SLURM holds back for two minutes, begin at once."""
    deadline = time.monotonic() + LIMIT
    while not happened():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {LIMIT:.0f} s until {what}\n{said('squeue')}\n{why()}")
        for job in said("squeue", "-h", "-t", "PD", "-r", "-o", "%A").split():
            said("scontrol", "update", f"JobId={job}", "StartTime=now")
        time.sleep(0.5)


def equal(one: Sweep, two: Sweep) -> None:
    """AssertionError unless both have the same weights, bit for bit."""
    first, second = one.weights(), two.weights()
    assert len(first) == len(second) > 0, f"{len(first)} and {len(second)} finished runs"
    for a, b in zip(first, second, strict=True):
        for name in a:
            assert torch.equal(a[name], b[name]), f"{name} differs"


@contextlib.contextmanager
def held(sweep: Sweep) -> Iterator[int]:
    """``sweep``, started and held in a step; gives the process id of rank 0. It goes on after leaving."""
    file = Path(f"{sweep.runs}.go")
    sweep.command += [f"+callbacks.hold={{_target_: experiments.slurm.hold.Hold, at: 9, file: {file}}}"]
    reached = Path(f"{file}.reached")
    sweep.start()
    until(
        lambda: reached.is_file() and reached.read_text(encoding="utf-8"),
        "the training gets to its ninth step",
        sweep.say,
    )
    yield int(reached.read_text(encoding="utf-8"))
    file.touch()


def restarts(job: str) -> int:
    """How often SLURM has started the job anew."""
    return int(said("scontrol", "show", "job", job).split("Restarts=")[1].split()[0])


def restarted(sweep: Sweep, pid: int, *command: str) -> str:
    """Give ``command`` the job of process ``pid``, and wait until SLURM has started it anew; the job's number."""
    job = job_of(pid)
    subprocess.run([*command, job], check=True)
    until(lambda: restarts(job), "SLURM starts the job anew", sweep.say)
    return job


class Tests:
    """Each public method is a test; its result is what the table says of it."""

    def __init__(self, work: Path) -> None:
        self.work = work

    @cached_property
    def alone(self) -> Sweep:
        """What the runs give without SLURM and without interruption."""
        sweep = Sweep(self.work, "alone", "expansion=2,4", launcher="basic")
        sweep.start().wait()
        return sweep

    @cached_property
    def two_ranks(self) -> Sweep:
        sweep = Sweep(self.work, "two-ranks", "expansion=2", "trainer.devices=2", launcher="basic")
        sweep.start().wait()
        return sweep

    def array(self) -> str:
        sweep = Sweep(self.work, "array", "expansion=2,4")
        sweep.start().wait()
        equal(self.alone, sweep)
        again = Sweep(self.work, "array", "expansion=2,4", f"hydra.sweep.dir={self.work / 'sweeps' / 'again'}")
        again.jobs = self.work / "sweeps" / "again" / ".submitit"
        assert again.start().wait().count("finished before, skipped") == 2
        return "two jobs in one array; a second call skips both"

    def warned(self) -> str:
        sweep = Sweep(self.work, "warned", "expansion=2,4")
        with held(sweep) as pid:
            time.sleep(1)
            restarted(sweep, pid, "scancel", "--signal=USR2")
        logs = sweep.wait()
        assert "by SIGUSR2; the same line goes on" in logs
        assert "resuming from its last checkpoint" in logs
        equal(self.alone, sweep)
        return "SIGUSR2: checkpoint within the epoch, requeued, resumed, the same weights"

    def requeued(self) -> str:
        sweep = Sweep(self.work, "requeued", "expansion=2,4")
        with held(sweep) as pid:
            restarted(sweep, pid, "scontrol", "requeue")
        assert "resuming from its last checkpoint" in sweep.wait()
        equal(self.alone, sweep)
        return "scontrol requeue, as when preempted: resumed, the same weights"

    def killed(self) -> str:
        sweep = Sweep(self.work, "killed", "expansion=2,4")
        with held(sweep) as pid:
            job = job_of(pid)
            os.kill(pid, signal.SIGKILL)
            until(lambda: "JobState=FAILED" in said("scontrol", "show", "job", job), "the job fails", sweep.say)
        assert sweep.process is not None
        sweep.process.terminate()  # without accounting, submitit does not hear of a job that is gone
        sweep.process.wait()
        until(lambda: not said("squeue", "-h"), "the other job ends", sweep.say)
        assert "resuming from its last checkpoint" in sweep.start().wait()
        equal(self.alone, sweep)
        return "SIGKILL: the same command resumes the run, the same weights"

    def ranks(self) -> str:
        sweep = Sweep(self.work, "ranks", "expansion=2", "trainer.devices=2", "hydra.launcher.cpus_per_task=2")
        with held(sweep) as pid:
            restarted(sweep, pid, "scancel", "--signal=USR2")
        assert "resuming from its last checkpoint" in sweep.wait()
        equal(self.two_ranks, sweep)
        assert sweep.devices() == [2]
        return "two ranks (gloo) stop at one step, requeued, resumed, the same weights"

    def nodes(self) -> str:
        sweep = Sweep(
            self.work, "nodes", "expansion=2", "trainer.num_nodes=2", "hydra.launcher.gpus_per_node=null",
            launcher="slurm_ddp",
        )  # fmt: skip
        with held(sweep) as pid:
            job = restarted(sweep, pid, "scancel", "--signal=USR2")
        assert "resuming from its last checkpoint" in sweep.wait()
        equal(self.two_ranks, sweep)
        assert sweep.devices() == [2]
        assert "NumNodes=2" in said("scontrol", "show", "job", job)
        return "two nodes with a rank on each, requeued, resumed, the weights of two ranks"

    def crash(self) -> str:
        crash = ["+callbacks.crash._target_=tests.training.crash.Crash", "+callbacks.crash.epoch=0"]
        sweep = Sweep(
            self.work, "crash", "expansion=2", "trainer.devices=2", "hydra.launcher.cpus_per_task=2", *crash,
            "seed=1,42", "+callbacks.crash.rank=${seed}",
        )  # fmt: skip
        logs = sweep.start().wait(fails=True)
        assert "RuntimeError: the power went out" in sweep.log.read_text(encoding="utf-8"), logs
        equal(self.two_ranks, sweep)
        left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(sweep.runs).encode() in read(p)]
        assert not left, f"still running: {left}"
        return "one rank fails: its error is shown, nothing is left over, the other job finishes"


def job_of(pid: int) -> str:
    """The number of the SLURM job that process ``pid`` belongs to."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(v.decode().split("=", 1) for v in variables if b"=" in v)["SLURM_JOB_ID"]


def read(path: Path) -> bytes:
    """What the file holds; nothing where its process has ended."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def clear() -> None:
    """End what a test has left: sweeps that wait, and their jobs."""
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.wait()
    started.clear()
    said("scancel", "--full", "--user=root")
    until(lambda: not said("squeue", "-h"), "jobs are gone")


def main() -> None:
    """Run the named tests, or all."""
    if missing() or os.geteuid() != 0:
        sys.exit(
            f"This test needs root and Debian's packages {PACKAGES} (not found: {', '.join(missing()) or 'none'}): "
            f"apt-get install --no-install-recommends {PACKAGES}"
        )
    names = sys.argv[1:] or [name for name in vars(Tests) if not name.startswith("_") and callable(vars(Tests)[name])]
    table = Table("test", "", "time", "what")
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that daemons and jobs end with this
    failed = False
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        work = Path(folder)
        work.chmod(0o755)
        tests = Tests(work)
        with cluster(work / "daemons"):
            for name in names:
                start = time.monotonic()
                try:
                    passed, what = "[green]passed[/]", getattr(tests, name)()
                except Exception:
                    traceback.print_exc()
                    passed, what, failed = "[red]failed[/]", "see above", True
                finally:
                    clear()
                table.add_row(name, passed, f"{time.monotonic() - start:.0f} s", what)
                print(f"{name}: {what}", flush=True)
    Console(width=120).print(table)
    sys.exit(failed)


if __name__ == "__main__":
    main()
