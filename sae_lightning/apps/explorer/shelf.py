"""The runs that the page was started with, each opened when it is first asked for."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

from sae_lightning.apps.explorer.book import Book
from sae_lightning.apps.explorer.refused import RefusedError
from sae_lightning.apps.explorer.uploads import Uploads
from sae_lightning.apps.opened import Opened


class Shelf:
    """``runs`` by number, over the pictures of ``split``, and the user's ``uploads``."""

    def __init__(self, runs: Sequence[Opened], split: str, device: str = "cpu") -> None:
        self.runs, self.split, self.device = runs, split, device
        self.uploads = Uploads()
        self._books: dict[int, Book] = {}
        self._locks = [Lock() for _ in runs]

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, run: int) -> Book:
        """Run ``run``, opened now if need be, which encodes the split; RefusedError if there is none."""
        if not 0 <= run < len(self.runs):
            raise RefusedError(404, f"There is no run {run}; this page was started with 0 to {len(self.runs) - 1}.")
        with self._locks[run]:
            if run not in self._books:
                try:
                    self._books[run] = Book(self.runs[run], self.split, self.uploads, self.device)
                except (ValueError, OSError) as error:
                    raise RefusedError(409, f"{self.runs[run].name} cannot be shown: {error}") from error
            return self._books[run]
