"""The one error of image sources, whose text is a sentence for the user, and what they say meanwhile."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar


class DataError(ValueError):
    """An image source that is missing, incomplete, unreadable or ambiguous."""


class DataWarning(UserWarning):
    """What a person should know about how their pictures and labels are read."""


warnings.filterwarnings("once", category=DataWarning)


def tell(sentence: str) -> None:
    """Say ``sentence`` as a DataWarning: once in a process, however often the data are opened."""
    warnings.warn_explicit(sentence, DataWarning, "data", 1)


def brief(error: BaseException) -> str:
    """The first 300 characters of what ``error`` says, on one line, for the brackets of a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "…"


_KNOWN: set[str] = set()  # kinds that this process has remarked on

_PRINTED: set[str] = set()

_GATHERED: ContextVar[dict[str, str] | None] = ContextVar("gathered", default=None)


def remark(kind: str, sentence: str) -> None:
    """Print ``sentence``, the first of its ``kind`` in this process, or leave it to who is ``gathering``."""
    if kind in _KNOWN:
        return
    _KNOWN.add(kind)
    gathered = _GATHERED.get()
    if gathered is None:
        say({kind: sentence})
    else:
        gathered[kind] = sentence


@contextmanager
def gathering() -> Iterator[dict[str, str]]:
    """Sentences by kind that are remarked inside, unprinted: for a worker, whose parent hears the same from others."""
    found: dict[str, str] = {}
    token = _GATHERED.set(found)
    try:
        yield found
    finally:
        _GATHERED.reset(token)


def say(sentences: Mapping[str, str]) -> None:
    """Print the sentences of kinds of which none was printed yet."""
    for kind, sentence in sentences.items():
        if kind not in _PRINTED:
            _PRINTED.add(kind)
            print(sentence, flush=True)


def begin_anew() -> None:
    """Forget what was said, as another data set comes."""
    _KNOWN.clear()
    _PRINTED.clear()
