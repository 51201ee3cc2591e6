"""Names of settings, and sentences about those that do not exist or do not fit: «did you mean …»."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sae_lightning.settings.kinds import Callbacks, Chosen, Kind, Maybe, Plus, Rule
from sae_lightning.settings.table import COMMANDS

SHOWN = 60  # characters of a value in a sentence


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


def misfit(name: str, value: Any, kind: Kind) -> str:
    """The sentence about a ``value`` that is not of its ``kind``."""
    hint = did_you_mean(str(value), kind.known)
    if kind.what == f"one of {', '.join(kind.known)}":
        return f"Unknown {name}={shown(value)}; choose {kind.what}{hint}."
    return f"{name}={shown(value)} must be {kind.what}{hint}."


def unknown(name: str, command: str, groups: Iterable[str] = ()) -> str:
    """The sentence about a setting that ``command`` does not have; ``groups`` are names that are no settings."""
    names = list(settings_of(command))
    section, _, last = name.rpartition(".")
    beside = [other for other in names if other.rpartition(".")[0] == section]
    same = [other for other in names if other.rpartition(".")[2] == last]
    takes = [other.rpartition(".")[2] for other in beside]
    close = near(last, [*takes, *(groups if not section else ())])
    found = (f"{section}.{close}" if section else close) if close else next(iter(same), None)
    if not found and not takes:
        found = near(name, names, 0.75)
    if found:
        return f"There is no setting {name}; did you mean {found}?"
    where = f"{section} takes" if section else "The settings are"
    return f"There is no setting {name}. {where} {', '.join(takes)}." if takes else f"There is no setting {name}."


def settings_of(command: str) -> Iterator[str]:
    """Names of all settings and sections of ``command``, shallow ones first."""
    yield from sorted(set(_names(COMMANDS[command], "")), key=lambda name: name.count("."))


def _names(rule: Rule, path: str) -> Iterator[str]:
    if isinstance(rule, Maybe):
        yield from _names(rule.rule, path)
    elif isinstance(rule, Plus):
        yield from _names(rule.rules, path)
    elif isinstance(rule, Chosen):
        for section in rule.sections.values():
            yield from _names(section, path)
    elif isinstance(rule, Callbacks):
        yield from _names(rule.names(), path)
    elif isinstance(rule, Mapping):
        for key, inner in rule.items():
            name = f"{path}.{key}" if path else key
            yield name
            yield from _names(inner, name)


def kind_of(name: str, command: str) -> Rule | None:
    """The rule of the setting ``name``; None where there is none, or it depends on other settings."""
    rule: Rule | None = COMMANDS[command]
    for key in name.split("."):
        while isinstance(rule, Maybe | Plus):
            rule = rule.rule if isinstance(rule, Maybe) else rule.rules
        if isinstance(rule, Chosen):
            rule = next((s for s in rule.sections.values() if isinstance(s, Mapping) and key in s), None)
        rule = rule.get(key) if isinstance(rule, Mapping) else None
    while isinstance(rule, Maybe):
        rule = rule.rule
    return rule


def takes_text(name: str, command: str) -> bool:
    """Whether the setting ``name`` is a text, such as a path or a pattern, or may be one."""
    rule = kind_of(name, command)
    return isinstance(rule, Kind) and rule.fits("a-[b]*")


def shown(value: Any) -> str:
    """``value`` as one would type it, cut where it is long."""
    if isinstance(value, Mapping):
        text = "{" + ", ".join(f"{key}: {shown(inner)}" for key, inner in value.items()) + "}"
    elif isinstance(value, Iterable) and not isinstance(value, str):
        text = f"[{', '.join(map(shown, value))}]"
    else:
        text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
