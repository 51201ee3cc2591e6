"""The one exception of this package, and how other libraries' errors become part of a sentence."""

from __future__ import annotations


class BackboneError(ValueError):
    """A backbone that cannot be had, or a tap, layer or image that does not fit it."""


def reason(error: Exception) -> str:
    """The first line of an error's message without its full stop (the second, too, where that ends in a colon), or the
    error's name when it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".:")
