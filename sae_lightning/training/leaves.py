"""The leaves of a config that count for what comes out: all but those that a list leaves out, each with a reason."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

OURS = ("sae_lightning.", "lightning.", "pytorch_lightning.")  # packages within which a class may move
WATCHERS = (  # Lightning's callbacks that look on
    "DeviceStatsMonitor", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary", "OnExceptionCheckpoint",
    "RichModelSummary", "RichProgressBar", "TQDMProgressBar", "ThroughputMonitor",
)  # fmt: skip
DEAF = ("callbacks.MonoLoss",)  # callbacks that count, but heed nothing that is logged
BATCHES = ("trainer.limit_", "trainer.overfit_batches", "trainer.val_check_interval")  # 1 is one batch, 1.0 are all
PRECISION = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}  # as Lightning reads them


@dataclass(frozen=True)
class Rules:
    """Which leaves do not count.

    ``left_out`` maps patterns of leaves to reasons, ``listened`` those that only a callback could bring into the
    result: they count where one is on. ``absent`` holds values that are as good as no leaf, which is what the code does
    without it. ``idle`` gives patterns, with reasons, that nothing reads in the config at hand.
    """

    left_out: Mapping[str, str]
    listened: Mapping[str, str]
    absent: Mapping[str, Any]
    idle: Callable[[Mapping[str, Any]], dict[str, str]]

    def counted(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The leaves of a resolved config that count, by name: numbers by value, and none that equals its absence."""
        leaves = {leaf: by_value(leaf, value) for leaf, value in leaves_of(config)}
        patterns = self.not_counted(leaves)
        return {k: v for k, v in leaves.items() if not of_leaf(k, patterns) and not self._is_absent(k, v)}

    def reason(self, leaf: str, config: Mapping[str, Any]) -> str | None:
        """Why ``leaf`` does not count in a resolved config; None where it does."""
        return of_leaf(leaf, self.not_counted(dict(leaves_of(config))))

    def not_counted(self, leaves: Mapping[str, Any]) -> dict[str, str]:
        """The patterns of what does not count among ``leaves``, with reasons."""
        heard = any(leaf.startswith("callbacks.") and not leaf.startswith(DEAF) for leaf in leaves)
        return {**self.left_out, **({} if heard else self.listened), **self.idle(leaves)}

    def _is_absent(self, leaf: str, value: Any) -> bool:
        """Whether ``value`` is as good as no leaf; null is Lightning's own default for its Trainer."""
        return value == of_leaf(leaf, self.absent) or (value is None and leaf.startswith("trainer."))


def of_leaf(leaf: str, patterns: Mapping[str, Any]) -> Any:
    """What ``patterns`` hold for ``leaf``, by name or by the first start of it with a * behind; None for nothing."""
    if leaf in patterns:
        return patterns[leaf]
    return next((held for start, held in patterns.items() if start[-1] == "*" and leaf.startswith(start[:-1])), None)


def leaves_of(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The leaves of a resolved config by dotted name; lists are leaves. Callbacks go by class, if they are on."""
    rest = {key: value for key, value in config.items() if key != "callbacks"}
    yield from _leaves(rest)
    names: Counter[str] = Counter()
    for _, entry in sorted((config.get("callbacks") or {}).items()):
        if is_on(entry) and not _looks_on(entry["_target_"]):
            name = f"callbacks.{class_name(entry['_target_'])}"
            names[name] += 1
            name += f"-{names[name]}" if names[name] > 1 else ""
            yield name, True
            yield from _leaves({key: value for key, value in entry.items() if key != "_target_"}, f"{name}.")


def _leaves(node: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def by_value(leaf: str, value: Any) -> Any:
    """``value`` so that what means the same is equal: 8 and 8.0, 32 and 32-true, a class and where it has moved to."""
    if isinstance(value, list | tuple):
        return [by_value(leaf, each) for each in value]
    if isinstance(value, Mapping):
        return {key: by_value(f"{leaf}.{key}", each) for key, each in value.items()}
    if leaf.endswith("._target_"):
        return class_name(str(value))
    if leaf == "extract.precision":
        return str(value)
    if leaf == "trainer.gradient_clip_val":
        value = value or None  # 0 is none
    if leaf == "trainer.precision":
        return PRECISION.get(str(value), str(value))
    if type(value) is float and value and leaf.startswith(BATCHES):
        return f"{value:g} of all" if value != 1 or leaf == "trainer.overfit_batches" else None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def is_on(entry: Mapping[str, Any] | None) -> bool:
    """Whether a callback's entry is switched on: it has a ``_target_``, and no weight of 0."""
    return entry is not None and "_target_" in entry and entry.get("weight") != 0


def class_name(target: str) -> str:
    """What ``target`` is called: without its module where that is ours or Lightning's, whose classes may move."""
    return target.rpartition(".")[2] if target.startswith(OURS) else target


def _looks_on(target: str) -> bool:
    """Whether a callback only looks on: Lightning's of this kind, and classes that say so by ``looks_on = True``."""
    from hydra.utils import get_class

    if target.startswith(OURS):
        return class_name(target) in WATCHERS
    try:
        return getattr(get_class(target), "looks_on", False) is True
    except Exception:  # whatever importing it raises is said when it is built
        return False


def short_hash(what: Any) -> str:
    """Eight hex digits of the SHA-256 of ``what`` as JSON."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
