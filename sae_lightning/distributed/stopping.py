"""Stopping when asked to: SLURM's warnings (SIGUSR1, SIGUSR2), SIGTERM, a closed terminal (SIGHUP) and Ctrl-C (SIGINT)
end a training at a checkpoint.

``stop_on_signals`` takes the signals in the main thread; a training, in whatever thread, looks at ``stop_requested``
after each step and raises ``Preempted``; ``stop_on_signals`` then hands the signal on: to submitit's handler, which
requeues the job, or to an exit with a sentence.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

TERMINAL = (signal.SIGHUP, signal.SIGINT)  # go to all processes of a terminal; left ignored where they are (nohup)

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, *TERMINAL)

FLAG = "SAE_LIGHTNING_STOP"  # environment of ranks: the file that their parent makes to ask them to stop

STEPS = ".steps"  # appended to the flag's name: the file in which ranks say where they have stopped

PATIENCE = 600.0  # seconds in which SLURM is to kill a job that it has sent SIGTERM


class Preempted(BaseException):
    """Training has stopped as ``signum`` asked; its checkpoint is written, of several trainings at ``steps``."""

    def __init__(self, signum: int, *steps: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum, self.steps = signum, steps


class _State:
    """What this process has been asked, and how many trainings in it will see to it by themselves."""

    def __init__(self) -> None:
        self.previous: dict[int, Any] = {}  # handlers that were there before; empty: signals are not taken
        self.signum: int | None = None
        self.busy = 0
        self.in_rank = False
        self.process = 0  # that takes signals; those forked off it do not
        self.what = ""
        self.lock = threading.Lock()
        self.checked = 0.0  # when the flag was last looked for


_state = _State()


def stop_requested() -> int | None:
    """The signal that asked this process to stop, or SIGUSR2 where its parent's flag says so; None: go on."""
    flag = os.environ.get(FLAG)
    if _state.signum is None and flag and time.monotonic() - _state.checked >= 1:
        _state.checked = time.monotonic()
        if os.path.exists(flag):
            _state.signum = signal.SIGUSR2
    return _state.signum


@contextmanager
def in_training() -> Iterator[None]:
    """While inside, a signal is only noted: who is inside looks at ``stop_requested`` and stops by itself."""
    with _state.lock:
        _state.busy += 1
    try:
        yield
    finally:
        with _state.lock:
            _state.busy -= 1


@contextmanager
def stop_on_signals(what: str, in_rank: bool = False) -> Iterator[None]:
    """Take SIGNALS while inside; ``what`` is named in the sentence said on stopping.

    Trainings inside stop at their next step and raise Preempted, after which the job exits (``exit_for_signal``);
    outside of trainings, where the last checkpoint is all there is to keep, it exits at once. A process ``in_rank``
    of a job leaves that to its parent: it ends silently with status 0, or at SIGTERM outside of trainings with 143. A
    second Ctrl-C ends it at once. Does nothing within another ``stop_on_signals`` or outside of the main thread.
    """
    if _state.previous or threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.signum, _state.in_rank, _state.what, _state.process = None, in_rank, what, os.getpid()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _state.previous = {n: handler for n, handler in before.items() if n not in TERMINAL or handler != signal.SIG_IGN}
    take_signals()
    stopped: Preempted | None = None
    try:
        yield
    except Preempted as error:
        stopped = error
    finally:
        previous = _restore()
    if stopped is not None and not in_rank:
        exit_for_signal(stopped.signum, what, previous, stopped.steps)


def exit_for_signal(signum: int, what: str, previous: dict[int, Any], steps: Sequence[int] = ()) -> NoReturn:
    """End the job, which has stopped at ``steps``: hand ``signum`` on to the handlers that were there before, then exit
    with 128 + ``signum``.

    In a submitit job either warning goes to submitit's handler, which requeues the job and exits. SIGTERM does not,
    as it may come from scancel: where SLURM preempts, it requeues the job itself once the grace time is over, which
    this waits for, as a job that ends by itself is not requeued.
    """
    at = " and ".join(map(str, sorted(set(steps))))
    where, from_there = (f" at step {at}", "there") if steps else ("", "the last checkpoint")
    name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
    print(f"{what}: stopped{where} by {name}; the same line goes on from {from_there}.", flush=True)
    submitted = "SUBMITIT_EXECUTOR" in os.environ
    warnings = (signal.SIGUSR2, signal.SIGUSR1) if submitted and signum != signal.SIGTERM else ()
    handler: Callable[..., Any] | None = next(
        (previous[n] for n in (signum, *warnings) if n != signal.SIGINT and callable(previous.get(n))), None
    )  # Python's own for SIGINT would raise KeyboardInterrupt
    if handler is not None:
        handler(signum, None)
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            time.sleep(1)
    sys.exit(128 + signum)


def _restore() -> dict[int, Any]:
    previous, _state.previous = _state.previous, {}
    for number, handler in previous.items():
        signal.signal(number, handler)
    return previous


def take_signals() -> None:
    """(Again) take the signals, also where Lightning has put itself in between."""
    if _state.previous and threading.current_thread() is threading.main_thread():
        for number in _state.previous:
            signal.signal(number, _on_signal)


def _on_signal(signum: int, frame: Any) -> None:
    if signum == signal.SIGHUP:
        _let_go_of_the_terminal()
    if os.getpid() != _state.process:  # a worker that decodes pictures: its parent ends it
        if signum not in TERMINAL:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
    elif _state.busy and not (signum == signal.SIGINT == _state.signum):
        _state.signum = _state.signum or signum
        if signum == signal.SIGINT:  # not print, which may be at work just now
            os.write(2, b"\nCtrl-C: stopping after this step, with a checkpoint. Once more stops at once.\n")
    elif not _state.in_rank:
        exit_for_signal(signum, _state.what, _restore())
    elif signum == signal.SIGTERM:
        sys.exit(128 + signum)


def _let_go_of_the_terminal() -> None:
    """Write nowhere where the terminal is gone: its next line of progress would be an error before the checkpoint."""
    for fd in (1, 2):
        try:
            termios.tcgetattr(fd)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, fd)
                os.close(nowhere)
