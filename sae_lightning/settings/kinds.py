"""The vocabulary of ``table.py``: kinds of values, and sections of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A setting of one value: ``what`` it must be, in words, and whether a plain Python value ``fits``."""

    what: str
    fits: Callable[[Any], bool]
    known: tuple[str, ...] = ()  # the names of a choice
    whole: bool = False  # 8.0 is taken as 8


@dataclass(frozen=True)
class Maybe:
    """``rule``, or null; with ``flags`` also true (as it is by default) or false (left out)."""

    rule: Rule
    flags: bool = False


@dataclass(frozen=True)
class Named:
    """A section whose keys are the user's own, each entry of which is like ``rule``."""

    rule: Rule


@dataclass(frozen=True)
class Plus:
    """A section of ``rules``, and of what a package has added to the mapping ``registry`` (``module:NAME``)."""

    rules: Section
    registry: str


@dataclass(frozen=True)
class Chosen:
    """The section of ``sections`` that the setting ``by`` names, in this section or the one around it.

    Anything where it names none of them: a package's own kind, whose settings only the package knows.
    """

    by: str
    sections: Mapping[str, Rule]
    kind: Kind | None = None  # of that setting


@dataclass(frozen=True)
class Callbacks:
    """Entries by name: the section of ``ours`` that the entry's ``_target_`` names, anything for other classes."""

    ours: Mapping[str, Section]

    def names(self) -> dict[str, Section]:
        """The same sections by the names that ours have in ``conf/``: those of their modules."""
        return {target.split(".")[-2]: section for target, section in self.ours.items()}


Section = Mapping[str, "Rule"]
Rule = Kind | Maybe | Named | Plus | Chosen | Callbacks | Section


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _bounds(low: float | None, high: float | None, above: float | None, below: float | None) -> str:
    if low is not None and high is not None:
        return f" from {low:,} to {high:,}".replace(",", "")
    said = [f"of at least {low}" if low is not None else f"above {above}" if above is not None else ""]
    said += [f"at most {high}" if high is not None else f"below {below}" if below is not None else ""]
    return "".join(f" {part}" for part in [" and ".join(filter(None, said))] if part)


def number(
    low: float | None = None, high: float | None = None, above: float | None = None, below: float | None = None
) -> Kind:
    """A finite number within bounds, of which ``above`` and ``below`` are not themselves allowed."""

    def fits(value: Any) -> bool:
        return _is_number(value) and not (
            (low is not None and value < low)
            or (high is not None and value > high)
            or (above is not None and value <= above)
            or (below is not None and value >= below)
        )

    return Kind(f"a number{_bounds(low, high, above, below)}", fits)


def whole(low: int | None = None, high: int | None = None) -> Kind:
    """A whole number within bounds; 8.0 is one."""
    inner = number(low, high)
    what = f"a whole number{_bounds(low, high, None, None)}"
    return Kind(what, lambda value: inner.fits(value) and value == int(value), whole=True)


def choice(*names: str, registry: str | None = None) -> Kind:
    """One of ``names``, or of the mapping ``module:NAME``, to which other modules add."""

    def fits(value: Any) -> bool:
        return str(value) in names or (registry is not None and str(value) in registered(registry))

    return Kind(f"one of {', '.join(names)}", fits, names)


def registered(registry: str) -> Any:
    """What ``module:NAME`` is; imported only to look for a name that the table does not have."""
    module, _, name = registry.partition(":")
    return getattr(import_module(module), name)


def either(*kinds: Kind) -> Kind:
    """What fits one of ``kinds``."""
    known = tuple(name for kind in kinds for name in kind.known)
    fits = lambda value: any(kind.fits(value) for kind in kinds)  # noqa: E731
    return Kind(" or ".join(kind.what for kind in kinds), fits, known, any(kind.whole for kind in kinds))


def list_of(kind: Kind, least: int = 1) -> Kind:
    """A list of at least ``least`` values of ``kind``."""

    def fits(value: Any) -> bool:
        return isinstance(value, list) and len(value) >= least and all(map(kind.fits, value))

    some = "a list" if least <= 1 else f"a list of at least {least}"
    return Kind(f"{some}, each {kind.what}" if kind is not ANYTHING else some, fits)


def matching(pattern: str, what: str) -> Kind:
    """A text, or a number as one, that the whole regular expression fits."""
    return Kind(what, lambda v: isinstance(v, str | int) and re.fullmatch(pattern, str(v)) is not None)


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str | int | float) and not isinstance(value, bool))
NAME = Kind("a name", lambda value: TEXT.fits(value) and str(value).strip() not in ("", ".", ".."))
PATH = Kind("a path", lambda value: TEXT.fits(value) and str(value) != "" and "\0" not in str(value))
SHARE = number(0, 1)
ANYTHING = Kind("anything", lambda value: True)
