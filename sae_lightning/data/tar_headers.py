"""Where the members of a tar file lie, read from its headers alone."""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sae_lightning.data.errors import DataError

BLOCK = 512
WINDOW = 4096  # bytes read at once, so that small members and their neighbours' headers cost one call
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard


class Member(NamedTuple):
    """A regular file in a tar: its name and where its bytes are."""

    name: str
    offset: int
    size: int


class CutShortError(DataError):
    """An archive whose end is missing."""


class _UnusualError(Exception):
    """Something that the fast reader leaves to Python's tarfile."""


class Window:
    """Reads of a file that mostly go forward in small steps."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY)
        self.end = os.fstat(self.fd).st_size
        self._start, self._bytes = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``, fewer at the end of the file."""
        at = offset - self._start
        if at < 0 or at + size > len(self._bytes):
            self._bytes = os.pread(self.fd, max(size, WINDOW), offset)
            self._start, at = offset, 0
        return self._bytes[at : at + size]

    def close(self) -> None:
        os.close(self.fd)


def members(path: Path, window: Window) -> Iterator[Member]:
    """The regular files in the tar ``path`` in order, links as the files they lead to.

    ustar, GNU and pax headers are read here, sparse files and links by tarfile. Raises DataError naming ``path`` when
    it is compressed or no tar at all, and CutShortError after the last whole member when its end is missing: within a
    member, or without the zeros that end an archive, for then nobody knows what followed.
    """
    done = 0
    try:
        for member in _fast(path, window):
            yield member
            done += 1
    except _UnusualError:
        found, fault = _by_tarfile(path, window)
        yield from found[done:]
        if fault is not None:
            raise fault from None


def check_whole(path: Path) -> None:
    """CutShortError when the end of the tar ``path`` is missing, DataError when it is none."""
    window = Window(path)
    try:
        for _ in members(path, window):
            pass
    finally:
        window.close()


def _fast(path: Path, window: Window) -> Iterator[Member]:
    head = window.read(0, BLOCK)
    if head.startswith(COMPRESSED):
        raise DataError(f"{path} is compressed; unpack it to a plain .tar, which can be read from any place.")
    if not head.strip(b"\0"):
        raise CutShortError(f"{path} is empty, not a tar file; copy it again.")
    offset = 0
    long_name, long_size = None, None
    while True:
        header = window.read(offset, BLOCK)
        if not header.strip(b"\0"):
            if not header:
                raise _broken(path, "without the zeros that end an archive")
            return
        if len(header) < BLOCK:
            raise _broken(path, "in a header")
        if header[257:262] != b"ustar":
            raise _UnusualError
        kind = header[156:157]
        size = _number(header[124:136])
        data = offset + BLOCK
        if kind in (b"x", b"L"):
            extra = window.read(data, size)
            if len(extra) < size:
                raise _broken(path, "in a header")
            if kind == b"L":
                long_name = _text(extra)
            else:
                long_name, long_size = _pax(extra, long_name)
        elif kind in (b"0", b"\0"):
            if long_size is not None:
                size = long_size
            name = long_name if long_name is not None else _name(header)
            if data + size > window.end:
                raise _broken(path, f"inside '{name}'")
            if not name.endswith("/"):
                yield Member(name, data, size)
            long_name, long_size = None, None
        elif kind == b"5":
            long_name, long_size = None, None
        elif kind != b"g":
            raise _UnusualError
        offset = data + (size + BLOCK - 1) // BLOCK * BLOCK


def _broken(path: Path, where: str) -> CutShortError:
    return CutShortError(f"{path} ends {where}: it is truncated; copy it again.")


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "replace")


def _name(header: bytes) -> str:
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        return f"{_text(header[345:500])}/{name}"
    return name


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU: a big-endian number
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        raise _UnusualError from None


def _pax(records: bytes, name: str | None) -> tuple[str | None, int | None]:
    """The path (``name`` if there is none) and size that pax records give."""
    size = None
    while records.strip(b"\0"):
        length, _, _ = records.partition(b" ")
        if not length.isdigit() or not len(length) + 1 < int(length) <= len(records):
            raise _UnusualError
        record, records = records[len(length) + 1 : int(length) - 1], records[int(length) :]
        key, _, value = record.partition(b"=")
        if key.startswith(b"GNU.sparse") or key == b"hdrcharset" or (key == b"size" and not value.isdigit()):
            raise _UnusualError
        if key == b"path":
            name = value.decode("utf-8", "replace")
        elif key == b"size":
            size = int(value)
    return name, size


def _by_tarfile(path: Path, window: Window) -> tuple[list[Member], CutShortError | None]:
    """The whole members, and what is wrong with the end. (tarfile takes any end for a good one.)"""
    files: list[Member] = []
    place: dict[str, Member] = {}
    try:
        with tarfile.open(path, "r:", errors="replace") as tar:
            for info in tar:
                if info.issparse():
                    raise DataError(f"{path} holds the sparse file '{info.name}'; pack it again without --sparse.")
                if info.islnk() or info.issym():
                    folder = posixpath.dirname(info.name) if info.issym() else ""
                    target = place.get(posixpath.normpath(posixpath.join(folder, info.linkname)))
                else:
                    target = Member(info.name, info.offset_data, info.size) if info.isreg() else None
                if target is not None and target.offset + target.size > window.end:
                    return files, _broken(path, f"inside '{info.name}'")
                if target is not None:
                    place[info.name] = target._replace(name=info.name)
                    files.append(place[info.name])
            end = window.read(tar.offset, BLOCK)
    except (tarfile.TarError, OSError, EOFError) as error:
        fault = f"{path} is truncated or no tar file ({error}); copy it again."
        if not files:
            raise DataError(fault) from error
        return files, CutShortError(fault)
    if not end:
        return files, _broken(path, "without the zeros that end an archive")
    return files, _broken(path, "in a header") if end.strip(b"\0") else None
