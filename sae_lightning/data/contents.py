"""What files hold, as digests that outlive a move, a copy or a new date: each file is read once."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from sae_lightning.files import cache_folder

SCHEMA = pa.schema(
    {"path": pa.string(), "size": pa.int64(), "modified": pa.int64(), "changed": pa.int64(), "digest": pa.binary(16)}
)
PART = 1 << 20  # bytes that are read at once
SHOWN = 1 << 28  # bytes to read from which a bar is shown
THREADS = 8


class Contents:
    """Digests of the files ``paths`` below ``root``, whose sizes and times are ``marks`` [n, 3] int64 (``scan.py``).

    A file is read when its digest is first asked for, and again when its size or times have changed: what was read
    lies in the user's cache folder. A cache that cannot be written costs the time to read again.
    """

    def __init__(self, root: str | Path, paths: Sequence[str], marks: np.ndarray) -> None:
        self.root, self.paths, self.marks = str(root), paths, marks

    def of(self, rows: Sequence[int] | np.ndarray) -> list[bytes]:
        """16 bytes for each of the files ``rows``, the same for all that cannot be read."""
        rows = np.asarray(rows, dtype=np.int64)
        file = cache_folder() / "contents" / f"{hashlib.sha256(os.path.realpath(self.root).encode()).hexdigest()[:24]}"
        known = _known(file)
        paths = pa.array([self.paths[row] for row in rows], pa.string())
        found = pc.index_in(paths, value_set=known["path"].combine_chunks())
        place = found.fill_null(-1).to_numpy(zero_copy_only=False)
        marks = np.stack([known[name].to_numpy() for name in ("size", "modified", "changed")], axis=1)
        there = place >= 0
        there[there] = (marks[place[there]] == self.marks[rows[there]]).all(axis=1)
        digests: list[bytes] = pc.take(known["digest"], pa.array(place, mask=~there)).to_pylist()
        unread = np.flatnonzero(~there)
        if len(unread):
            for at, digest in zip(unread, self._read(rows[unread]), strict=True):
                digests[at] = digest
            fresh = self.marks[rows[unread]]
            added = [paths.take(unread), *fresh.T, pa.array([digests[at] for at in unread], pa.binary(16))]
            kept = np.ones(len(known), dtype=bool)
            kept[place[unread][place[unread] >= 0]] = False
            keep_table(pa.concat_tables([known.filter(pa.array(kept)), pa.table(added, schema=SCHEMA)]), file)
        return digests

    def _read(self, rows: np.ndarray) -> list[bytes]:
        few = self.marks[rows, 0].sum() < SHOWN
        with ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(lambda row: _digest(Path(self.root, self.paths[row])), rows.tolist())
            return list(tqdm(found, desc="Reading what is new", total=len(rows), unit="file", leave=False, disable=few))


def _digest(path: Path) -> bytes:
    whole = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while part := file.read(PART):
                whole.update(part)
    except OSError:  # is said where its picture is read
        whole = hashlib.sha256(b"unreadable")
    return whole.digest()[:16]


def _known(file: Path) -> pa.Table:
    try:
        return pq.read_table(file, schema=SCHEMA)
    except (OSError, pa.ArrowInvalid):
        return SCHEMA.empty_table()


def keep_table(table: pa.Table, file: Path) -> None:
    """Write a cache in one move; one that cannot be written only costs the time to make it again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            part = Path(folder) / file.name
            pq.write_table(table, part)
            os.replace(part, file)
    except OSError:
        return
