"""Sums that give mean and deviation, in float64, and add over shards, ranks and stores."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

CHUNK = {"cpu": 1 << 22, "cuda": 1 << 26}  # elements turned into float64 at a time


@dataclass(frozen=True)
class Moments:
    """Of ``count`` tokens: ``mean`` [d], ``m2`` [d] summed squared deviations, ``norms`` summed lengths; float64.

    ``lost`` [d] is the summed squared difference between the features and what was stored of them.
    """

    count: int
    mean: Tensor
    m2: Tensor
    norms: float
    lost: Tensor

    @classmethod
    def of(cls, x: Tensor, lost: Tensor | None = None) -> Moments:
        """Of tokens ``x`` [..., d] of any float type, on their device; two passes over pieces of them."""
        rows = x.reshape(-1, x.shape[-1])
        if rows.device.type not in CHUNK:  # without float64
            rows = rows.cpu()
        parts = [_piece(piece) for piece in rows.split(max(1, CHUNK[rows.device.type] // rows.shape[1]))]
        whole = merge(parts)
        return whole if lost is None else cls(whole.count, whole.mean, whole.m2, whole.norms, lost.cpu().double())

    @classmethod
    def none(cls) -> Moments:
        """Of no token; ``merge`` takes only others."""
        nothing = torch.empty(0, dtype=torch.float64)
        return cls(0, nothing, nothing, 0.0, nothing)

    @property
    def variance(self) -> float:
        """Summed squared deviation from the mean, over tokens and dimensions."""
        return float(self.m2.sum())

    @property
    def rounding(self) -> tuple[float, float]:
        """The share of the variance that was lost, and the largest such share of one dimension.

        Dimensions that hardly vary beside the median one are passed over.
        """
        varies = self.m2 > 1e-6 * self.m2.median()
        share = (self.lost / self.m2.clamp_min(1e-300))[varies]
        return float(self.lost.sum()) / max(self.variance, 1e-12), float(share.max()) if len(share) else 0.0

    def to_json(self) -> dict[str, Any]:
        """Numbers and lists that give the same float64 values back."""
        return {
            "count": self.count, "mean": self.mean.tolist(), "m2": self.m2.tolist(), "norms": self.norms,
            "lost": self.lost.tolist(),
        }  # fmt: skip

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Moments:
        """The inverse of ``to_json``."""
        vectors = {key: torch.tensor(content[key], dtype=torch.float64) for key in ("mean", "m2", "lost")}
        if vectors["lost"].ndim == 0:  # of an older store: known in sum only
            vectors["lost"] = (vectors["lost"] / max(len(vectors["mean"]), 1)).expand_as(vectors["mean"])
        return cls(content["count"], norms=content["norms"], **vectors)


def _piece(rows: Tensor) -> Moments:
    x = rows.double()
    mean = x.mean(0)
    norms = float(x.square().sum(1).sqrt().sum())
    m2 = (x - mean).square().sum(0).cpu()
    return Moments(len(x), mean.cpu(), m2, norms, torch.zeros_like(m2))


def merge(parts: Iterable[Moments]) -> Moments:
    """The moments of the union of parts, each given by its own [Chan et al. 1979]; at least one part."""
    return reduce(_two, parts)


def _two(a: Moments, b: Moments) -> Moments:
    count = a.count + b.count
    delta = b.mean - a.mean
    m2 = a.m2 + b.m2 + delta.square() * (a.count * b.count / count)
    return Moments(count, a.mean + delta * (b.count / count), m2, a.norms + b.norms, a.lost + b.lost)
