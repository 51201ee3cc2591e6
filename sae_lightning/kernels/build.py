"""Compiling the C files in ``csrc`` once for this processor, with any C compiler; the package works without one."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

SOURCES = sorted(Path(__file__).with_name("csrc").glob("*.[ch]"))
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC", "-std=gnu11"]


def cache_folder() -> Path:
    """Where compiled kernels lie: ``$SAE_LIGHTNING_CACHE`` or the user's cache folder."""
    chosen = os.environ.get("SAE_LIGHTNING_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sae_lightning"


def _processor() -> str:
    """What the machine code depends on, so that a shared home folder serves nodes with different processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags"))
    except OSError:
        return platform.processor()


def _compile(compiler: str, library: Path) -> None:
    """Build ``library``, with threads if the compiler has OpenMP; OSError says what it complained of."""
    library.parent.mkdir(parents=True, exist_ok=True)
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
    loaded = {line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines()} if maps.exists() else set()
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
    made_from = "\n".join([*(path.read_text() for path in SOURCES), *FLAGS, _processor(), compiler or ""])
    library = cache_folder() / f"native-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
    try:
        if not library.is_file():
            if compiler is None:
                raise OSError("there is no C compiler (cc) on the path")
            _compile(compiler, library)
        _share_threads()
        return ctypes.CDLL(str(library))
    except OSError as error:
        warnings.warn(
            f"The CPU kernels cannot be built ({error}); training on the CPU falls back to PyTorch's operators, "
            "which are slower. Install a C compiler, or set SAE_LIGHTNING_NATIVE=0 to silence this.",
            stacklevel=2,
        )
        return None
