"""What is said once about a kind of picture: how it was read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

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
