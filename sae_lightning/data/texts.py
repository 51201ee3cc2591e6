"""Captions that are read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from sae_lightning.data.errors import DataError


class Texts(Sequence[str]):
    """``texts[i]`` is ``read(rows[i])``. ``read`` must be picklable for DataLoader workers."""

    def __init__(self, read: Callable[[int], str], rows: np.ndarray) -> None:
        self._read, self._rows = read, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Texts: ...
    def __getitem__(self, index: int | slice) -> str | Texts:
        if isinstance(index, slice):
            return Texts(self._read, self._rows[index])
        return self._read(int(self._rows[index]))

    def take(self, index: np.ndarray) -> Texts:
        """The texts ``index`` [m] (int64) in that order."""
        return Texts(self._read, self._rows[index])


def take_texts(texts: Iterable[str] | None, index: np.ndarray) -> Sequence[str] | None:
    """Those of ``texts`` at ``index`` [m]; still unread if they were."""
    if texts is None or isinstance(texts, Texts):
        return None if texts is None else texts.take(index)
    texts = list(texts)
    return [texts[i] for i in index]


class TextFiles:
    """Reads the text beside picture i: ``<root>/<path>`` with the suffix .txt; DataError when it has gone."""

    def __init__(self, root: str, paths: Sequence[str]) -> None:
        self.root, self.paths = root, paths

    def __call__(self, row: int) -> str:
        path = Path(self.root, self.paths[row].rpartition(".")[0] + ".txt")
        try:
            return path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"The caption {path} cannot be read ({error}); it must be a UTF-8 text file.") from error
