"""The kernel's page cache, file by file: what lies in it, putting files in, dropping them.

Dropping is asked of the guest's kernel alone; a hypervisor or disk behind it may keep what it likes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

PIECE = 16 * 2**20


def files_in(folder: Path) -> list[Path]:
    """All files below ``folder``, by name."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def cold(folder: Path) -> str:
    """Drop all files of ``folder`` from the cache; returns a remark when some would not go, else nothing."""
    share = evict(files_in(folder))
    return f"{share:.0%} of the files would not leave the page cache" if share > 0.01 else ""


def warm(folder: Path) -> str:
    """Put all files of ``folder`` into the cache, all in the same way: dropped first, then read from start to end.

    A cache that was filled by random reads is made of smaller pieces and is read more slowly.
    Returns a remark when not everything fits, else nothing.
    """
    evict(files_in(folder))
    share = load(files_in(folder))
    return f"only {share:.0%} of the files stayed in the page cache" if share < 0.99 else ""


def evict(paths: Iterable[Path]) -> float:
    """Write ``paths`` out, drop them from the cache, and return the share of their bytes that stayed all the same.

    Pages that some process has mapped stay; so close readers first.
    """
    paths = list(paths)
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return resident(paths)


def load(paths: Iterable[Path]) -> float:
    """Read ``paths`` once, so that they lie in the cache; returns the share of their bytes that does."""
    paths, piece = list(paths), bytearray(PIECE)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass
    return resident(paths)


def resident(paths: Iterable[Path]) -> float:
    """Share of the pages of ``paths`` that lie in the cache, by mincore; 0 for no pages at all."""
    total = present = 0
    for path in paths:
        pages = _pages(path)
        total, present = total + len(pages), present + len(pages) - pages.count(0)
    return present / total if total else 0.0


def _pages(path: Path) -> bytes:
    """One byte for each page of a file; its lowest bit says whether the page is cached."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    size = path.stat().st_size
    if not size:
        return b""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), f"mmap of {path} failed")
    try:
        present = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
        if libc.mincore(address, size, present):
            raise OSError(ctypes.get_errno(), f"mincore of {path} failed")
        return bytes(present.raw)
    finally:
        libc.munmap(address, size)
