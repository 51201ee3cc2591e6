"""Every picture below a folder, with what tells that it has changed, in one pass over the directories."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sae_lightning.data.errors import DataError

SUFFIXES = frozenset(("jpg", "jpeg", "jfif", "png", "bmp", "webp", "avif", "gif", "tif", "tiff", "ppm", "pgm"))


@dataclass(frozen=True)
class Scan:
    """Pictures below ``root``: ``paths`` relative to it with /, sorted; ``marks`` [n, 2] int64: size, mtime in ns.

    ``texts`` are the relative paths of .txt files, without their suffix.
    """

    root: str
    paths: list[str]
    marks: np.ndarray
    texts: frozenset[str]


def existing_folder(path: str | Path) -> Path:
    """``path`` with ~ expanded; DataError when it is no folder."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}; set data.path to the folder that holds the pictures.")
    return folder


def scan(root: Path, below: str = "") -> Scan:
    """The pictures in ``root/below`` at any depth; hidden files are left out, links followed.

    About 300,000 pictures a second on a local disk. DataError when a picture is a link to nothing or a
    folder cannot be read.
    """
    paths: list[str] = []
    marks = array("q")
    texts = set()
    for path, entry in walk(root, below):
        stem, _, suffix = path.rpartition(".")
        if suffix.lower() in SUFFIXES:
            paths.append(path)
            marks.extend(size_and_time(entry))
        elif suffix == "txt":
            texts.add(stem)
    return Scan(str(root), paths, np.array(marks, dtype=np.int64).reshape(-1, 2), frozenset(texts))


def files_mark(path: Path) -> str:
    """Hex digest of relative paths, sizes and times of all files below ``path`` (or of that one file)."""
    digest = hashlib.sha256()
    files = [("", path)] if path.is_file() else walk(path)
    for name, file in files:
        digest.update("{}:{}:{}\n".format(name, *size_and_time(file)).encode())
    return digest.hexdigest()


def size_and_time(file: os.DirEntry | Path) -> tuple[int, int]:
    """Bytes and modification time in ns; DataError when the file has gone or is a link to nothing."""
    try:
        stat = file.stat()
    except OSError as error:
        raise DataError(f"{os.fspath(file)} cannot be read ({error.strerror}); repair or remove it.") from error
    return stat.st_size, stat.st_mtime_ns


def walk(root: Path, below: str = "") -> Iterator[tuple[str, os.DirEntry]]:
    """(path relative to ``root``, entry) of every file in ``root/below`` that is not hidden, in sorted order.

    DataError when a folder cannot be read or a name is not UTF-8.
    """
    prefix = f"{below}/" if below else ""
    try:
        yield from _walk(os.path.join(root, below), prefix, frozenset())
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}); repair or remove it.") from error


def _walk(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, os.DirEntry]]:
    here = os.stat(folder)
    if (here.st_dev, here.st_ino) in above:
        return  # a link to a folder that it lies in
    above |= {(here.st_dev, here.st_ino)}
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if not entry.name.isascii() and any("\ud800" <= c <= "\udfff" for c in entry.name):
            raise DataError(f"The name of {entry.path!r} is not UTF-8; rename it.")
        if entry.is_dir():
            yield from _walk(entry.path, f"{prefix}{entry.name}/", above)
        else:
            yield prefix + entry.name, entry
