"""Reading pictures and captions of indexed tar files, from any thread or worker process."""

from __future__ import annotations

import os
from functools import lru_cache

import pyarrow as pa

from sae_lightning.data.errors import DataError
from sae_lightning.data.tar_index import TarIndex


class TarPictures:
    """The encoded bytes of picture i; DataError when its tar has gone or become shorter."""

    def __init__(self, index: TarIndex) -> None:
        self.tars = [(str(path), time) for path, time in zip(index.tars, index.marks[:, 1].tolist(), strict=True)]
        self.tar = index.table["tar"].to_numpy()
        self.offset, self.size = index.table["offset"].to_numpy(), index.table["size"].to_numpy()

    def __call__(self, row: int) -> bytes:
        path, time = self.tars[self.tar[row]]
        size = int(self.size[row])
        try:
            file = _open(path, time)
            data = os.pread(file.descriptor, size, int(self.offset[row]))
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); it was there when it was indexed.") from error
        if len(data) != size:
            raise DataError(f"{path} has become shorter since it was indexed; copy it again.")
        return data


class ArrowTexts:
    """Text i of an Arrow array."""

    def __init__(self, texts: pa.StringArray) -> None:
        self.texts = texts

    def __call__(self, row: int) -> str:
        return self.texts[row].as_py()


class _File:
    """A descriptor that is closed when nobody holds it any more, so that a thread may go on reading an evicted one."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@lru_cache(maxsize=128)
def _open(path: str, time: int) -> _File:
    """One open file a tar and process; ``time`` opens it anew when it has been replaced."""
    return _File(path)
