"""Locks by files: the kernel's where the file system has them, else leases that their holder renews.

Network file systems may have no ``flock`` (ENOSYS), or none that answers (ENOLCK: NFS without its lock daemon). There a
lock is a file beside the other, which names its holder, is touched by it, and is passed over when that has stopped.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLease, Timeout

CHOICE = "SAE_LIGHTNING_LOCKS"  # environment: one of KINDS
KINDS = ("auto", "soft", "none")
MISSING = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
LEASE = 60.0  # seconds without a sign of life after which a lease is anyone's
_without: set[int] = set()  # file systems (devices) found to have no locks


class LockError(ValueError):
    """A lock file that cannot be used, or a way to lock that does not exist."""


class Lock:
    """A lock on ``path`` for one process at a time, of any node: see CHOICE for how."""

    def __init__(self, path: Path, thread_local: bool = True) -> None:
        self.path, self.thread_local = path, thread_local
        self._inner: BaseFileLock | None = None

    def acquire(self, timeout: float = -1) -> None:
        """Wait for the lock, for so many seconds if not negative; Timeout where another process keeps it."""
        how = kind()
        if how == "none":
            return
        hard = how == "auto" and os.stat(self.path.parent).st_dev not in _without
        if not hard:
            self.path.touch()  # which others look for
        self._inner = self._hard() if hard else self._lease()
        try:
            self._inner.acquire(timeout)
        except OSError as error:  # also a Timeout, which has no number
            if not hard or error.errno not in MISSING:
                raise
            _without.add(os.stat(self.path.parent).st_dev)
            print(
                f"The file system of {self.path.parent} has no locks ({error.strerror}); files that are renewed stand "
                f"in for them, and a process that dies without a word holds its own for {LEASE:.0f} s.",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            self._inner = self._lease()
            self._inner.acquire(timeout)

    def release(self) -> None:
        """Let go of it."""
        if self._inner is not None:
            self._inner.release()

    def taken(self) -> bool:
        """Whether another process has it now."""
        try:
            self.acquire(timeout=0)
        except Timeout:
            beside = self._inner.lock_file if isinstance(self._inner, SoftFileLease) else None
            return beside is None or time.time() - os.stat(beside).st_mtime < 2 * LEASE
        self.release()
        return False

    @property
    def holder(self) -> str:
        """Who has it, as far as that is known."""
        owner = self._inner.owner if isinstance(self._inner, SoftFileLease) else None
        return "Another job" if owner is None else f"Process {owner.pid} on {owner.hostname}"

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _hard(self) -> BaseFileLock:
        return FileLock(self.path, thread_local=self.thread_local, fallback_to_soft=False)

    def _lease(self) -> BaseFileLock:
        beside = self.path.with_name(self.path.name + ".lease")
        return SoftFileLease(beside, lease_duration=LEASE, thread_local=self.thread_local)


def kind() -> str:
    """How to lock, as CHOICE says: ``auto``, ``soft`` (by leases), or ``none`` (you see to it yourself)."""
    chosen = os.environ.get(CHOICE, KINDS[0])
    if chosen not in KINDS:
        raise LockError(f"Unknown {CHOICE}={chosen}; choose one of {', '.join(KINDS)}.")
    return chosen


@contextmanager
def held(path: Path, doing: str) -> Iterator[None]:
    """Hold the lock ``path`` inside; says once that it waits for a process that is ``doing`` the same."""
    lock = Lock(path)
    try:
        try:
            lock.acquire(timeout=0.1)
        except Timeout:
            print(f"{lock.holder} is {doing}; waiting for it.", flush=True)
            lock.acquire()
    except OSError as error:
        raise LockError(f"{path} cannot be locked: {error}. See to the folder, or set {CHOICE}=soft.") from error
    try:
        yield
    finally:
        lock.release()
