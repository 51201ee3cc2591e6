"""Commands in processes that are forked off a server which has imported the stack, so that one starts in 50 ms.

``run("train.py", "k=8", cwd=folder)`` is what ``python train.py k=8`` does in that folder, but for the interpreter's
start. A test whose point is the start itself uses ``subprocess``.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from types import TracebackType

import torch

ROOT = Path(__file__).resolve().parents[1]
HANG = 600.0  # seconds after which whatever a test waits for is taken to hang; no result depends on it
PROCESSES = multiprocessing.get_context("forkserver")


def wait_for(condition: Callable[[], object]) -> None:
    """Return when ``condition()`` holds; AssertionError where it never does."""
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class Command:
    """``python arguments…`` in ``cwd``, at work until ``end``; killed where a ``with`` block is left before."""

    def __init__(self, *arguments: str, cwd: Path, **variables: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._arguments = arguments
        self._out, self._err = (Path(self._folder.name) / name for name in ("stdout", "stderr"))
        forkserver.ensure_running()
        given = (arguments, cwd, dict(os.environ) | variables, (self._out, self._err), server_address())
        self.process = PROCESSES.Process(target=_main, args=given)
        self.process.start()

    @property
    def running(self) -> bool:
        return self.process.exitcode is None

    def kill(self) -> None:
        """As by kill -9."""
        self.process.kill()
        self.process.join()

    def end(self) -> subprocess.CompletedProcess[str]:
        """Wait until it has ended by itself; what it said."""
        self.process.join(HANG)
        hung = self.running
        if hung:
            self.kill()
        said = [path.read_text() if path.is_file() else "" for path in (self._out, self._err)]
        assert not hung, f"still running: {said}"
        return subprocess.CompletedProcess(self._arguments, self.process.exitcode or 0, *said)

    def __enter__(self) -> Command:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()
        self._folder.cleanup()


def run(*arguments: str, cwd: Path, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    """``python arguments…`` in ``cwd``, with ``variables`` in its environment, and what it said.

    ``arguments`` are ``-c`` and a program, ``-m`` and a module, or a file of the repository, and theirs.
    """
    with Command(*arguments, cwd=cwd, **variables) as command:
        done = command.end()
    assert not check or done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def server_address() -> str:
    """Where the server of this process listens; of that which started it, in a process forked off the server."""
    return forkserver._forkserver._forkserver_address  # type: ignore[attr-defined,no-any-return]


def share_server(address: str) -> None:
    """Let this process start others by the server at ``address``, of another process; Python would start a second."""
    server = forkserver._forkserver  # type: ignore[attr-defined]
    server._forkserver_address, server.ensure_running = address, lambda: None
    if server._forkserver_alive_fd is None:  # the server lives as long as the process that started it
        server._forkserver_alive_fd = os.pipe()[1]


def _main(
    arguments: tuple[str, ...], cwd: Path, variables: Mapping[str, str], outputs: tuple[Path, Path], address: str
) -> None:
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(int(variables.get("OMP_NUM_THREADS", 1)))
    multiprocessing.set_start_method("fork", force=True)  # of workers, as in a job that a user starts
    share_server(address)
    status: object = 0
    try:
        _run(list(arguments))
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    sys.exit(status)


def _run(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [str(ROOT / arguments[0]), *arguments[1:]]
        runpy.run_path(sys.argv[0], run_name="__main__")
