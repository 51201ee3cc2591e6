"""Files: written in one move, read with a sentence, locked, and set aside where a power cut has left them in pieces."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLease, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized
from torch import Tensor

from sae_lightning.registry import one_of


def whole(path: Path) -> bool:
    """Whether there is a file ``path``, of json or safetensors as its name says, that can be read."""
    try:
        if path.suffix == ".json":
            return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
        with safe_open(path, "pt"):  # which compares the file's length with what its header says
            return True
    except (OSError, ValueError, SafetensorError):
        return False


def set_damaged_aside(paths: Sequence[Path], then: str) -> None:
    """``set_aside`` those of ``paths`` that are there and not ``whole``."""
    for path in paths:
        if path.is_file() and not whole(path):
            set_aside(path, f"its {path.stat().st_size:,} bytes are not a whole file", then)


def set_aside(path: Path, fault: str, then: str) -> None:
    """Give ``path`` the ending ``.damaged`` if that may be, and say what is wrong with it and what comes ``then``."""
    aside = path.with_name(path.name + ".damaged")
    try:
        os.replace(path, aside)
        now = f"is now called {aside.name}"
    except OSError as error:
        now = f"cannot be renamed ({error.strerror})"
    print(f"{path} is damaged ({fault}) and {now}; {then}.", file=sys.stderr, flush=True)


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
    one_of(chosen, KINDS, CHOICE, LockError)
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


def read_json(path: Path, remedy: str, error: type[ValueError] = ValueError) -> dict[str, Any]:
    """The object in a JSON file; an ``error`` says what is wrong, and the ``remedy``."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as why:
        raise error(f"{path} cannot be read ({(why.strerror or str(why)).lower()}); {remedy}.") from why
    except ValueError as why:
        raise error(f"{path} is not valid JSON ({why}); {remedy}.") from why
    if not isinstance(content, dict):
        raise error(f"{path} holds no object; {remedy}.")
    return content


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Give ``path`` the content in one move: a reader, also after a power cut, sees the old file or the whole new one.

    OSError leaves nothing behind. The file has the mode that the umask gives.
    """
    partial = partial_name(path)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """``write_bytes`` of a text."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """``write_bytes`` of JSON that people can read."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """``write_bytes`` of a safetensors file, which colleagues can read: safetensors' own are the user's alone."""
    write_bytes(path, serialized({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata))


def write_table(path: Path, table: Any) -> None:
    """``write_bytes`` of a parquet file with an Arrow ``table``."""
    import pyarrow.parquet as pq

    content = io.BytesIO()
    pq.write_table(table, content)
    write_bytes(path, content.getbuffer())


def partial_name(path: Path) -> Path:
    """Where this process writes what will be ``path``: hidden beside it."""
    return path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}")


def half_files(folder: Path, name: str = "*") -> list[Path]:
    """What processes, killed or at work, have left where they wrote ``folder / name`` (or a pattern of names)."""
    return sorted(folder.glob(f".{name}.*-*"))


def cause(error: OSError) -> str:
    """Why a file could not be written, for a sentence."""
    return "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else str(error)


def data_sha256(path: Path, start: int) -> str:
    """SHA-256 of a file's bytes from ``start`` on."""
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` outlive a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError:
        pass  # some network file systems cannot
    finally:
        os.close(fd)


def file_sha256(path: Path) -> str:
    """SHA-256 of a whole file."""
    return data_sha256(path, 0)


class CacheError(OSError):
    """The folder for compiled kernels cannot be used."""


def cache_folder() -> Path:
    """Where compiled kernels lie: ``$SAE_LIGHTNING_CACHE`` or in the user's cache folder; CacheError without either."""
    chosen, caches = os.environ.get("SAE_LIGHTNING_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if chosen:
        return Path(chosen)
    try:
        return (Path(caches) if caches else Path.home() / ".cache") / "sae_lightning"
    except RuntimeError as error:
        raise CacheError("this user has no home folder") from error


def lend_cache(folder: Path) -> None:
    """Where this user has no home folder to write to, as in many containers, let caches be in ``folder``.

    That is, of all libraries which follow XDG_CACHE_HOME, in this process and those that it starts. Where the machine
    knows no home folder at all, without which some libraries (W&B's) fail, that is one.
    """
    lent = str(folder.absolute() / ".cache")
    if not (os.environ.get("SAE_LIGHTNING_CACHE") or os.environ.get("XDG_CACHE_HOME")):
        try:
            _make_writable(cache_folder())
        except CacheError:
            os.environ["XDG_CACHE_HOME"] = lent
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = lent


def _make_writable(folder: Path) -> None:
    """Make ``folder``; CacheError where this user may not write there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise CacheError(f"cannot write {folder}: {error.strerror}") from error
