"""Features whose latents are known: sparse non-negative sums of known directions, without pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import ndtri

from sae_lightning.data.errors import DataError
from sae_lightning.data.images import data_source
from sae_lightning.data.splits import SPLITS


@data_source("synthetic")
def pictures(data: Mapping[str, Any], split: str) -> NoReturn:
    """DataError: there are none."""
    raise DataError(
        f"data={data.get('name', 'synthetic')} has features and no pictures, and makes its stores when they are first "
        "read; choose an image data set."
    )


@dataclass(frozen=True)
class World:
    """Tokens that are sums of ``n_true`` random unit directions in ``d_in`` dimensions; ``seed`` sets all of it.

    Latent i fires with a probability ~ (i + 1)^-``power``, ``active`` a token on average, with a magnitude that is
    uniform between the two ``magnitudes``; ``noise`` is Gaussian and its deviation that of each dimension. Where
    ``correlation`` is above 0, latents fire where normal variables exceed a bound, and those of each ``group`` of
    consecutive latents have this correlation. To each of the first n_true / (1 + ``children``) latents belong about
    ``children`` of the others, which fire only where it does: nested latents, which SAEs tend to absorb. Neither
    changes how often a latent fires. DataError for what cannot be.
    """

    d_in: int
    n_true: int
    active: float
    power: float = 0.0
    magnitudes: tuple[float, float] = (1.0, 1.0)
    noise: float = 0.0
    correlation: float = 0.0
    group: int = 8
    children: int = 0
    seed: int = 0

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> World:
        """From a config section, which may hold more."""
        given = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        return cls(**given | {"magnitudes": tuple(data["magnitudes"])})

    def __post_init__(self) -> None:
        low, high = self.magnitudes[0], self.magnitudes[-1]
        if not 0 < self.active <= self.n_true:
            raise DataError(
                f"data.active={self.active} latents a token must be above 0 and at most data.n_true={self.n_true}."
            )
        if len(self.magnitudes) != 2 or not 0 < low <= high:
            raise DataError(f"data.magnitudes={list(self.magnitudes)} must be two positive numbers that ascend.")
        if not 0 <= self.correlation < 1:
            raise DataError(f"data.correlation={self.correlation} must be at least 0 and below 1.")
        if not 0 <= self.children < self.n_true:
            raise DataError(f"data.children={self.children} must be at least 0 and below data.n_true={self.n_true}.")
        if self.rates[0] > 1:
            raise DataError(
                f"data.active={self.active} with data.power={self.power} lets the first of {self.n_true} latents fire "
                f"with probability {self.rates[0]:.2f}; lower one of them, or raise data.n_true."
            )

    @cached_property
    def rates(self) -> np.ndarray:
        """The probability with which each latent fires, [n_true], descending."""
        law = np.arange(1, self.n_true + 1) ** -float(self.power)
        return self.active * law / law.sum()

    @cached_property
    def directions(self) -> np.ndarray:
        """[n_true, d_in] of unit norm, float64."""
        drawn = np.random.default_rng([self.seed, len(SPLITS)]).standard_normal((self.n_true, self.d_in))
        return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)

    @cached_property
    def parents(self) -> np.ndarray:
        """The latent that each belongs to, [n_true] int64; -1 for those that belong to none."""
        roots = self.n_true // (1 + self.children)
        child = np.arange(self.n_true - roots)
        return np.concatenate([np.full(roots, -1), child * roots // max(1, len(child))])

    def tokens(self, split: str, part: int, n: int) -> tuple[np.ndarray, csr_matrix]:
        """``n`` tokens of the numbered part of a split: features [n, d_in] and true codes [n, n_true], float32."""
        rng = np.random.default_rng([self.seed, SPLITS.index(split), part])
        nested, levels = self.parents >= 0, self.rates.copy()
        levels[nested] /= self.rates[self.parents[nested]]
        z = rng.standard_normal((n, self.n_true))
        if self.correlation:
            roots = int((~nested).sum())
            place = np.where(nested, np.arange(self.n_true) - roots, np.arange(self.n_true))
            group = place // self.group + nested * (roots // self.group + 1)  # none holds both parents and children
            shared = rng.standard_normal((n, int(group.max()) + 1))[:, group]
            z = np.sqrt(1 - self.correlation) * z + np.sqrt(self.correlation) * shared
        fires = z > -ndtri(levels)
        fires[:, nested] &= fires[:, self.parents[nested]]
        codes = np.where(fires, rng.uniform(*self.magnitudes, fires.shape), 0.0)
        x = codes @ self.directions + self.noise * rng.standard_normal((n, self.d_in))
        return x.astype(np.float32), csr_matrix(codes.astype(np.float32))
