"""«Did you mean …»: the known name nearest to one that is not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of ``known`` that ``word`` resembles most; None where none does."""
    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), by_lower, n=4, cutoff=cutoff)
    return by_lower[min(found, key=lambda name: _apart(word.lower(), name))] if found else None


def _apart(one: str, other: str) -> tuple[float, int]:
    """How unlike two words are; of equally unlike ones the one of the same length is nearer."""
    return 1 - difflib.SequenceMatcher(None, other, one).ratio(), abs(len(one) - len(other))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean …?)``, or nothing."""
    found = near(word, known)
    return "" if found is None else f" (did you mean {found}?)"
