"""How many images of a split are used, and in which order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sae_lightning.data.errors import DataError
from sae_lightning.data.images import ImageData
from sae_lightning.data.splits import SPLITS


def arrange(images: ImageData, cfg: Mapping[str, Any]) -> ImageData:
    """At most ``limit`` images, a fair share of every class, shuffled if ``shuffle``; both keys may be absent.

    Both draw from ``seed``, by default 0. Raises DataError for a limit below 1.
    """
    limit, seed = checked_limit(cfg.get("limit")), cfg.get("seed", 0)
    if limit is not None and limit < len(images):
        images = images.take(stratified_sample(images.labels, limit, seed))
    if cfg.get("shuffle"):
        rng = np.random.default_rng([seed, SPLITS.index(images.split)])
        images = images.take(rng.permutation(len(images)))
    return images


def checked_limit(limit: int | None) -> int | None:
    """``limit`` itself; DataError unless it is null or a whole number of at least 1."""
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise DataError(f"data.limit={limit} must be null or a whole number of at least 1.")
    return limit


def stratified_sample(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Sorted indices [size] of ``labels`` [n], of every class its share of them, rounded up or down."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(labels.size)  # a random order …
    order = order[np.argsort(labels[order], kind="stable")]  # … within each class
    counts = np.bincount(labels)
    exact = counts * size / labels.size
    quota = np.floor(exact).astype(np.int64)
    most_cut = np.argsort(-(exact - quota), kind="stable")
    quota[most_cut[: size - quota.sum()]] += 1
    place = np.arange(labels.size) - np.repeat(np.cumsum(counts) - counts, counts)  # of an image within its class
    return np.sort(order[place < np.repeat(quota, counts)])
