"""Functions run side by side in processes that are forked off a server, which has imported the stack once.

An interpreter that imports PyTorch and Lightning takes ten seconds and more; a process forked off the server takes a
twentieth of one. Where there is a GPU each process starts its own interpreter instead, as CUDA forbids forks of
whatever has asked for a device.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, Listener, wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from threadpoolctl import threadpool_limits

ELSEWHERE = ("/tmp", "/var/tmp", "/dev/shm")


def without_sockets() -> str | None:
    """Why multiprocessing cannot open sockets here, neither in TMPDIR nor ELSEWHERE; None where it can from now on."""
    fault = _fault()
    if fault is None:
        return None
    kept: dict[str, str] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    for place in ELSEWHERE:
        try:
            folder = tempfile.mkdtemp(prefix="pymp-", dir=place)
        except OSError:
            continue
        kept["tempdir"] = folder  # where multiprocessing.util.get_temp_dir looks first
        if _fault() is None:
            Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-100)
            return None
        del kept["tempdir"]
        shutil.rmtree(folder, ignore_errors=True)
    return fault


def _fault() -> str | None:
    try:
        Listener(family="AF_UNIX").close()
    except OSError as error:
        return str(error)
    return None


SHUTDOWN = 30.0  # seconds that processes have to end by themselves before they are killed

# What SLURM or a closed terminal sends to all processes of a job: it is for the job's first process to answer.
FOR_THE_JOB = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)

_preloaded: list[str] = []


def preload(*modules: str) -> None:
    """Name what the server imports when it starts; the first call in a process decides."""
    if not _preloaded:
        _preloaded.extend(modules)
        multiprocessing.get_context("forkserver").set_forkserver_preload(_preloaded)


class Processes:
    """Processes that each run ``work(*arguments)`` of their own; used through ``run_together``."""

    def __init__(
        self, work: Callable[..., object], arguments: Sequence[tuple], variables: Sequence[Mapping[str, str]], own: Path
    ) -> None:
        preload(work.__module__)
        without_sockets()  # else the server's could not be opened where TMPDIR is long
        self._context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
        self._reasons = [own / f"failure-{i}" for i in range(len(arguments))]
        self._failed: list[int] = []
        self._processes: list[BaseProcess] = []
        with _signals_blocked(), _nameless_main(), _outputs() as outputs:
            for given, chosen, reason in zip(arguments, variables, self._reasons, strict=True):
                process = self._context.Process(target=_run, args=(work, given, dict(chosen), reason, outputs))  # type: ignore[attr-defined]
                process.start()
                self._processes.append(process)

    def ended(self, seconds: float) -> bool:
        """Wait so many seconds at most; whether all have ended, or one has failed, which ends the others."""
        wait([process.sentinel for process in self._processes if process.exitcode is None], seconds)
        codes = [process.exitcode for process in self._processes]
        if any(codes):  # not None, and not 0
            self._failed = [i for i, code in enumerate(codes) if code]
            self.end()
        return None not in [process.exitcode for process in self._processes]

    def failures(self) -> dict[int, str]:
        """By number of the process, first failure first: why it failed; empty where none did."""

        def when(i: int) -> float:
            return self._reasons[i].stat().st_mtime if self._reasons[i].is_file() else float("inf")

        return {i: self._reason(i) for i in sorted(self._failed, key=when)}

    def _reason(self, i: int) -> str:
        code = self._processes[i].exitcode or 0
        if self._reasons[i].is_file():
            return self._reasons[i].read_text(encoding="utf-8")
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"

    def end(self) -> None:
        """End those that still run: asked first, killed if that does not help."""
        running = [process for process in self._processes if process.is_alive()]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + SHUTDOWN
        for process in running:
            process.join(max(0, deadline - time.monotonic()))
        for process in running:
            process.kill()
            process.join()


@contextmanager
def run_together(
    work: Callable[..., object], arguments: Sequence[tuple], variables: Sequence[Mapping[str, str]]
) -> Iterator[Processes]:
    """Start a process for each of ``arguments``, with ``variables`` as its environment; none outlives the block.

    ``work`` is a function of a module. Whatever ends this process, kill -9 included, ends them too.
    """
    with tempfile.TemporaryDirectory(prefix="sae-lightning-") as own:
        processes = None
        try:
            processes = Processes(work, arguments, variables, Path(own))
            yield processes
        finally:
            if processes is not None:
                processes.end()


def _run(
    work: Callable[..., object], arguments: tuple, variables: dict[str, str], reason: Path, outputs: list[Connection]
) -> None:
    """What a process does: ``work``, whose error it shows and writes to ``reason``, then exits with 1."""
    for number, output in enumerate(outputs, start=1):
        os.dup2(output.fileno(), number)
        output.close()
    for number in FOR_THE_JOB:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*FOR_THE_JOB, signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(variables)
    threads = int(variables.get("OMP_NUM_THREADS", 0))
    if threads > 0:  # the libraries read the variable when the server loaded them
        threadpool_limits(threads)
        torch.set_num_threads(threads)
    try:
        work(*arguments)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr, flush=True)
            reason.write_text(stop.code, encoding="utf-8")
        raise
    except Exception as error:
        traceback.print_exc()
        reason.write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        sys.exit(1)


def _end_with_parent() -> None:
    """When the process that started this one is gone: ask this one to stop, which leaves a checkpoint, or kill it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SHUTDOWN)
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def _outputs() -> Iterator[list[Connection]]:
    """This process's standard output and error of now, which may not be those that the server has."""
    outputs = [Connection(os.dup(number), readable=False) for number in (1, 2)]
    try:
        yield outputs
    finally:
        for output in outputs:
            output.close()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes (and the server) that start inside have the job's signals blocked, until they choose what to do."""
    resource_tracker.ensure_running()  # which would unblock some
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*FOR_THE_JOB, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _nameless_main() -> Iterator[None]:
    """Processes that start inside do not import the running script again, which need not guard its main part."""
    main: Any = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
