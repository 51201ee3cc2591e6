"""Dose and response: a classifier's probability while one latent is forced to rising magnitudes [MSAE §5.3, Fig. 6]."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import special

from sae_lightning.apps.edits import WholeImages, forced
from sae_lightning.apps.statistics import Z95

POINTS = 65

FLAT = 0.01  # of probability: how near to its end a curve must stay to count as level


class Response(NamedTuple):
    """Probabilities [m] of the positive class at each magnitude: the mean over some images and its 95 % interval."""

    mean: np.ndarray
    lo: np.ndarray
    hi: np.ndarray


class Dose(NamedTuple):
    """The response to ``latent`` at ``magnitudes`` [m], of positive and of negative images, and of one example each.

    ``usual`` is the 95th percentile of its magnitude where it fires, ``plateau`` the magnitude from which all later
    means over all images stay within 0.01 of the last one, None where they do not level off. ``examples`` [2, m] and
    ``original`` [2] (magnitude) and ``before`` [2] (probability) belong to a positive and a negative image.
    """

    latent: int
    magnitudes: np.ndarray
    positive: Response
    negative: Response
    usual: float
    plateau: float | None
    examples: np.ndarray
    original: np.ndarray
    before: np.ndarray


def dose(
    latent: int, effect: float, logits: np.ndarray, truth: np.ndarray, images: WholeImages, examples: tuple[int, int],
    reach: float = 3.0,
) -> Dose:  # fmt: skip
    """Force ``latent``, from 0 to ``reach`` times its largest magnitude, on all ``images`` of ``truth`` [n].

    ``effect`` is its direct effect, ``logits`` [n] those without an edit, ``examples`` the rows of a positive and a
    negative image. ValueError for a latent that never fires there.
    """
    own = images.magnitudes[:, [latent]].toarray().ravel().astype(np.float64)
    if not own.any():
        raise ValueError(f"Latent {latent} is silent on all {len(own)} images of the task; choose another.")
    magnitudes = np.linspace(0, reach * own.max(), POINTS)
    p = special.expit(forced(logits, images, effect, latent, magnitudes))
    chosen = list(examples)
    return Dose(
        latent, magnitudes, _response(p[truth]), _response(p[~truth]), usual_magnitude(own),
        plateau(magnitudes, p.mean(0)), p[chosen], own[chosen], special.expit(logits[chosen]),
    )  # fmt: skip


def usual_magnitude(magnitudes: np.ndarray) -> float:
    """The 95th percentile of those of ``magnitudes`` [n] that are not zero."""
    return float(np.quantile(magnitudes[magnitudes > 0], 0.95))


def plateau(magnitudes: np.ndarray, mean: np.ndarray) -> float | None:
    """The first of ``magnitudes`` [m] from which on ``mean`` [m] stays within 0.01 of its end.

    None where that is in the last tenth, as for a curve that still rises.
    """
    away = np.flatnonzero(np.abs(mean - mean[-1]) > FLAT)
    first = int(away[-1]) + 1 if len(away) else 0
    return float(magnitudes[first]) if first < 0.9 * len(magnitudes) else None


def _response(p: np.ndarray) -> Response:
    mean, half = p.mean(0), Z95 * p.std(0, ddof=1) / np.sqrt(len(p))
    return Response(mean, np.clip(mean - half, 0, 1), np.clip(mean + half, 0, 1))


def pushes(latents: np.ndarray, effects: np.ndarray, logits: np.ndarray, images: WholeImages) -> np.ndarray:
    """By how much the probability of each of n images moves when a latent is forced to its usual magnitude.

    The mean, over ``latents`` one at a time, of the absolute change; [n].
    """
    moved = np.zeros(len(logits))
    for latent in latents.tolist():
        own = images.magnitudes[:, [latent]].toarray().ravel()
        edited = forced(logits, images, float(effects[latent]), latent, np.array([usual_magnitude(own)]))[:, 0]
        moved += np.abs(special.expit(edited) - special.expit(logits))
    return moved / max(1, len(latents))


def typical(logits: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
    """The rows of a positive and a negative image: those whose logit is nearest to the median of their class."""
    rows = []
    for side in (truth, ~truth):
        there = np.flatnonzero(side)
        rows.append(int(there[np.abs(logits[there] - np.median(logits[there])).argmin()]))
    return rows[0], rows[1]
