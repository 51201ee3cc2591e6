"""Compiling the C files in ``csrc`` once for this processor, with any C compiler; the package works without one."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

SOURCES = sorted(Path(__file__).with_name("csrc").glob("*.[ch]"))
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC", "-std=gnu11"]


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

    That is, of all libraries which heed XDG_CACHE_HOME, in this process and those that it starts. Where the machine
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


def _processor() -> str:
    """What the machine code depends on, so that a shared home folder serves nodes with different processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "".join(next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags"))
    except OSError:
        return platform.processor()


def _compile(compiler: str, library: Path) -> None:
    """Build ``library``, with threads if the compiler has OpenMP; OSError says what it complained of."""
    _make_writable(library.parent)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        files = [str(path) for path in SOURCES if path.suffix == ".c"]
        for threads in ("-fopenmp", "-fopenmp-simd"):
            command = [*compiler.split(), *FLAGS, threads, "-o", str(built), *files, "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                os.replace(built, library)
                return
    raise OSError(f"{compiler} says: {' '.join(done.stderr.split())[-300:]}")


def _share_threads() -> None:
    """Let the kernels run on PyTorch's own OpenMP threads: a second pool would wait for the first one's spinning."""
    maps = Path("/proc/self/maps")
    loaded = (
        {line.split(maxsplit=5)[-1].strip() for line in maps.read_text(encoding="utf-8").splitlines()}
        if maps.exists()
        else set()
    )
    for path in sorted(loaded):
        if "torch" in path and Path(path).name.startswith(("libgomp", "libiomp5", "libomp")):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


@cache
def load_native() -> ctypes.CDLL | None:
    """The compiled kernels, or None (with one warning that says why) where they cannot be built.

    ``SAE_LIGHTNING_NATIVE=0`` turns them off.
    """
    if os.environ.get("SAE_LIGHTNING_NATIVE") == "0" or sys.platform == "win32":
        return None
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    made_from = "\n".join(
        [*(path.read_text(encoding="utf-8") for path in SOURCES), *FLAGS, _processor(), compiler or ""]
    )
    try:
        library = cache_folder() / f"native-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
        _share_threads()
        with suppress(OSError):  # missing, or cut by a crash
            return ctypes.CDLL(str(library))
        if compiler is None:
            raise OSError("there is no C compiler (cc) on the path")
        _compile(compiler, library)
        return _loaded(library)
    except OSError as error:
        place = isinstance(error, CacheError)
        change = "Set SAE_LIGHTNING_CACHE to a folder that can be written" if place else "Install a C compiler"
        warnings.warn(
            f"The CPU kernels cannot be built ({error}); training on the CPU falls back to PyTorch's operators, "
            f"which are slower. {change}, or set SAE_LIGHTNING_NATIVE=0 to silence this.",
            stacklevel=2,
        )
        return None


def _loaded(library: Path) -> ctypes.CDLL:
    """A library that was just built; CacheError where its folder's file system lets nothing be executed."""
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise CacheError(f"cannot execute what lies in {library.parent}: {error}") from error
