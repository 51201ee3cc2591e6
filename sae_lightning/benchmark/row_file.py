"""Rows of numbers appended to a file, so that a stream longer than memory can be read back, also by a later process."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np


class RowFile:
    """Rows [width] of one ``dtype`` in ``path`` (plain numbers where ``width`` is None), appended and mapped.

    A file that is there is cut to its first ``rows`` rows: what an interrupted process wrote after its last checkpoint
    goes. ValueError when it has fewer.
    """

    def __init__(self, path: Path, dtype: type[np.number], width: int | None = None, rows: int = 0) -> None:
        self.path, self.dtype, self.width = path, np.dtype(dtype), width
        self._row_bytes = self.dtype.itemsize * (width or 1)
        self._rows = rows
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab")  # noqa: SIM115
        if self._file.tell() < rows * self._row_bytes:
            raise ValueError(f"{path} holds {self._file.tell() // self._row_bytes} rows; expected {rows}.")
        self._file.truncate(rows * self._row_bytes)

    def __len__(self) -> int:
        """Rows."""
        return self._rows

    def append(self, rows: np.ndarray) -> None:
        """Add rows [n, width], or [n] numbers, in this file's dtype."""
        shape = (len(rows),) if self.width is None else (len(rows), self.width)
        if rows.shape != shape:
            raise ValueError(f"{self.path.name} takes rows of shape {list(shape)}; got {list(rows.shape)}.")
        self._file.write(np.ascontiguousarray(rows, self.dtype).data)
        self._rows += len(rows)

    def mapped(self) -> np.ndarray:
        """All rows [n, width], or [n] numbers, mapped read-only."""
        shape = (self._rows,) if self.width is None else (self._rows, self.width)
        if not self._rows:
            return np.zeros(shape, self.dtype)
        if not self._file.closed:
            self._file.flush()
        return np.memmap(self.path, self.dtype, "r", shape=shape)

    def sync(self) -> None:
        """Bring what was appended to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, which stays."""
        self._file.close()

    def remove(self) -> None:
        """Close and delete the file."""
        self._file.close()
        self.path.unlink(missing_ok=True)
