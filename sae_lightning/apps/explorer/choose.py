"""Which latents are listed, and in what order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def choose(
    values: np.ndarray, names: Sequence[str], label: np.ndarray, images_fired: np.ndarray, *,
    text: str = "", of_class: int | None = None, at_least: int = 0, descending: bool = True,
) -> np.ndarray:  # fmt: skip
    """The latents [m] int64 that fit, sorted by ``values`` [d_sae]; of equals the lower first, NaN last either way.

    ``text``: a latent's number, or words that all occur in its name, in any case. ``of_class``: its most frequent
    class. ``at_least``: pictures on which it fires.
    """
    fits = images_fired >= at_least
    if of_class is not None:
        fits &= label == of_class
    if text.strip():
        fits &= named(names, text)
    latents = np.flatnonzero(fits)
    keys = values[latents]
    return latents[np.argsort(-keys if descending else keys, kind="stable")]  # NaN sorts last in both


def named(names: Sequence[str], text: str) -> np.ndarray:
    """Which latents [d_sae] bool have the number ``text`` (``12`` or ``#12``) or a name with all its words."""
    words = text.casefold().split()
    found = np.array([all(word in name.casefold() for word in words) for name in names], dtype=bool)
    number = text.strip().removeprefix("#")
    if number.isascii() and number.isdigit() and len(number) < 10 and int(number) < len(names):
        found[int(number)] = True
    return found
