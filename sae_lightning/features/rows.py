"""Reading rows of a file into memory: in order, or each to a place of its own in one pass.

Nothing is memory-mapped: a file that is cut while it is read then ends in an error, not in a bus error, and the
process holds no pages beyond the buffers it was given.
"""

from __future__ import annotations

import ctypes
import os
import threading
from functools import cache
from pathlib import Path

import numpy as np

from sae_lightning.features.manifest import StoreError
from sae_lightning.kernels.build import load_native

STAGE = 1 << 20  # bytes; fits the second-level cache of most processors
_local = threading.local()


def read_rows(path: Path, offset: int, out: np.ndarray, places: np.ndarray | None, count: int) -> None:
    """``count`` rows of ``out.shape[1]`` bytes from ``path`` at byte ``offset`` into ``out`` [n, bytes] uint8.

    Row i goes to ``out[places[i]]`` (int64), or to ``out[i]`` where ``places`` is None. StoreError when the file
    ends before, OSError when it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        got = _in_order(fd, offset, out[:count]) if places is None else _scatter(fd, offset, out, places[:count])
    finally:
        os.close(fd)
    if got < count:
        raise StoreError(f"{path} ends {count - got} rows before it should: it was cut while it was being read.")


def _in_order(fd: int, offset: int, out: np.ndarray) -> int:
    view = memoryview(out.reshape(-1))  # type: ignore[arg-type]
    at = 0
    while at < len(view):
        got = os.preadv(fd, [view[at:]], offset + at)
        if got == 0:
            break
        at += got
    return at // out.shape[1]


def _scatter(fd: int, offset: int, out: np.ndarray, places: np.ndarray) -> int:
    read = _native_scatter()
    row = out.shape[1]
    stage = _stage(row)
    if read is None:
        return _portable_scatter(fd, offset, out, places, stage)
    places = np.ascontiguousarray(places, dtype=np.int64)
    got = read(fd, offset, row, places.ctypes.data, len(places), out.ctypes.data, stage.ctypes.data, len(stage) // row)
    if got < 0:
        raise OSError(-got, os.strerror(-got))
    return got


def _portable_scatter(fd: int, offset: int, out: np.ndarray, places: np.ndarray, stage: np.ndarray) -> int:
    row = out.shape[1]
    done = 0
    while done < len(places):
        rows = stage[: min(len(stage) // row, len(places) - done) * row].reshape(-1, row)
        got = _in_order(fd, offset + done * row, rows)
        out[places[done : done + got]] = rows[:got]
        done += got
        if got < len(rows):
            break
    return done


def _stage(row: int) -> np.ndarray:
    """This thread's scratch memory: at least one row, about ``STAGE`` bytes."""
    wanted = max(STAGE // row, 1) * row
    stage: np.ndarray | None = getattr(_local, "stage", None)
    if stage is None or len(stage) < wanted:
        stage = _local.stage = np.empty(wanted, np.uint8)
    return stage[:wanted]


@cache
def _native_scatter() -> ctypes._NamedFuncPointer | None:
    library = load_native()
    if library is None:
        return None
    function = library.read_rows
    word, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [word, word, word, pointer, word, pointer, pointer, word]
    function.restype = word
    return function
