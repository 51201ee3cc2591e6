"""What the page is told instead of an answer."""

from __future__ import annotations


class RefusedError(ValueError):
    """A request that cannot be answered: an HTTP ``status`` and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
