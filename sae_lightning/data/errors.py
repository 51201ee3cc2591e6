"""The one error of image sources, whose text is a sentence for the user, and what they say meanwhile."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar


class DataError(ValueError):
    """An image source that is missing, incomplete, unreadable or ambiguous."""


class NotGivenError(DataError):
    """A data set of which the config does not say where it lies."""


class DataWarning(UserWarning):
    """What a person should know about how their pictures and labels are read."""


warnings.filterwarnings("once", category=DataWarning)


def brief(error: BaseException) -> str:
    """The first 300 characters of what ``error`` says, on one line, for the brackets of a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "…"


_SAID: set[str] = set()  # kinds of sentences that this process has said

_GATHERED: ContextVar[dict[str, str] | None] = ContextVar("gathered", default=None)


def tell(sentence: str, kind: str | None = None) -> None:
    """Say ``sentence`` as a DataWarning: once in a process, however often the data are opened.

    Of a ``kind`` the first is said, or left to who is ``gathering``.
    """
    gathered = _GATHERED.get()
    if kind is not None and gathered is not None:
        gathered.setdefault(kind, sentence)
    elif kind is None or kind not in _SAID:
        _SAID.update([] if kind is None else [kind])
        warnings.warn_explicit(sentence, DataWarning, "data", 1)


@contextmanager
def gathering() -> Iterator[dict[str, str]]:
    """Sentences by kind that are told inside, unsaid: for a worker, whose parent hears the same from others."""
    found: dict[str, str] = {}
    token = _GATHERED.set(found)
    try:
        yield found
    finally:
        _GATHERED.reset(token)


def say(sentences: Mapping[str, str]) -> None:
    """Say what was gathered."""
    for kind, sentence in sentences.items():
        tell(sentence, kind)


def begin_anew() -> None:
    """Forget what was said of kinds, as another data set comes."""
    _SAID.clear()
