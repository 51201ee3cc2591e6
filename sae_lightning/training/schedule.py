"""What changes over a training: learning rate, k and the sparsity weight, each a function of the step alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

SHAPES = ("linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """Shares of all steps, between 0 and 1.

    ``warmup``: the learning rate rises linearly from 0. ``decay``: it falls to 0 at the end, in ``shape``
    "linear" or "cosine" (decay 1 with cosine is the usual cosine schedule). ``sparsity_warmup``: the weight
    of the term ``sparsity`` rises linearly from 0. ``k_share``: k falls linearly from ``k_from`` to its value.

    ValueError for shares outside [0, 1] or an unknown shape.
    """

    warmup: float = 0.0
    decay: float = 0.0
    shape: str = "linear"
    sparsity_warmup: float = 0.0
    k_from: float | None = None
    k_share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("warmup", "decay", "sparsity_warmup", "k_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"schedule.{name}={getattr(self, name)} must be a share of all steps, from 0 to 1.")
        if self.shape not in SHAPES:
            raise ValueError(f"Unknown schedule.shape={self.shape}; choose one of {', '.join(SHAPES)}.")
        if self.k_share > 0 and self.k_from is None:
            raise ValueError("schedule.k_share needs schedule.k_from, the k to start at.")

    @classmethod
    def of(cls, settings: dict[str, Any] | None) -> Schedule:
        """From a config section; ValueError names a key that is none of its fields."""
        settings = dict(settings or {})
        known = {f.name for f in fields(cls)}
        if set(settings) - known:
            raise ValueError(
                f"Unknown schedule setting {sorted(set(settings) - known)}; known: {', '.join(sorted(known))}."
            )
        return cls(**settings)

    def lr_factor(self, step: int, steps: int) -> float:
        """Of the learning rate at ``step`` of ``steps``."""
        warmup, decay = round(self.warmup * steps), round(self.decay * steps)
        rising = (step + 1) / warmup if step < warmup else 1.0
        left = max(0, steps - step) / decay if decay and step > steps - decay else 1.0
        falling = left if self.shape == "linear" else 0.5 * (1 - math.cos(math.pi * left))
        return min(rising, falling)

    def sparsity_factor(self, step: int, steps: int) -> float:
        """Of the sparsity weight."""
        rise = self.sparsity_warmup * steps
        return min(1.0, (step + 1) / rise) if rise >= 1 else 1.0

    def k_at(self, k: float, step: int, steps: int) -> float:
        """The k of training at ``step``, annealed from ``k_from``."""
        fall = self.k_share * steps
        if self.k_from is None or step >= fall:
            return k
        return self.k_from + (k - self.k_from) * step / fall
