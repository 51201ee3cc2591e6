"""The one exception of this package, and how other libraries' errors become part of a sentence."""

from __future__ import annotations


class BackboneError(ValueError):
    """A backbone that cannot be had, or a tap, layer or image that does not fit it."""


def reason(error: Exception) -> str:
    """The first line of an error's message without its full stop, or the error's name when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__
