"""Dose and response: a classifier's probability while one latent is forced to rising magnitudes [MSAE §5.3, Fig. 6]."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from scipy import special
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from sae_lightning.apps.statistics import Z95
from sae_lightning.saes import SAE
from sae_lightning.saes.codes import SparseCodes, as_csr


class Wholes(NamedTuple):
    """n whole images: of patch tokens means over an image's tokens t, of other features the one vector.

    ``features`` and ``decoded`` [n, d_in] float64 are the encoder's and the SAE's reconstruction. ``magnitudes``
    [n, d_sae] are the codes pooled by maximum. ``amounts`` [n, d_sae] are means of code_t · scale_t and ``room`` [n] of
    scale_t, the scale that an input norm took from the token (1 without one): forcing latent i to magnitude m on all
    tokens adds (m · room - amounts_i) · std · W_dec[i] to the image.
    """

    features: np.ndarray
    decoded: np.ndarray
    magnitudes: csr_matrix
    amounts: csr_matrix
    room: np.ndarray

    def take(self, rows: np.ndarray) -> Wholes:
        """The images ``rows`` (positions or a mask)."""
        return Wholes(*(each[rows] for each in self))

    def where(self, mask: np.ndarray, other: Wholes) -> Wholes:
        """These images, but where ``mask`` [n] does not hold ``other``'s."""
        rows = np.arange(len(mask)) + np.where(mask, 0, len(mask))
        return Wholes(*(
            (vstack([mine, its], format="csr") if isinstance(mine, csr_matrix) else np.concatenate([mine, its]))[rows]
            for mine, its in zip(self, other, strict=True)
        ))  # fmt: skip


@torch.no_grad()
def wholes(sae: SAE, batches: Iterable[Tensor]) -> Wholes:
    """Encode and decode ``batches`` of raw features [b, P, d_in], P tokens an image."""
    parts: list[Wholes] = []
    for batch in batches:
        images, tokens = batch.shape[:2]
        codes = sae.encode(batch.float())
        lists = SparseCodes(codes.latents, codes.values, codes.offsets, codes.d_sae)
        scale = torch.ones(images * tokens, 1) if codes.frame is None else codes.frame[1]
        scaled = SparseCodes(codes.latents, codes.values * scale[codes.rows(), 0], codes.offsets, codes.d_sae)
        parts.append(Wholes(
            batch.double().mean(1).numpy(), sae.decode(codes).double().reshape(batch.shape).mean(1).numpy(),
            as_csr(lists.pool(tokens)), as_csr(scaled.pool(tokens, "mean")),
            scale.double().reshape(images, tokens).mean(1).numpy(),
        ))  # fmt: skip
    if not parts:
        raise ValueError("There are no images to encode; widen the task's classes or the split.")
    return Wholes(*(
        vstack(each, format="csr") if isinstance(each[0], csr_matrix) else np.concatenate(each)
        for each in zip(*parts, strict=True)
    ))  # fmt: skip


def forced(logits: np.ndarray, images: Wholes, effect: float, latent: int, magnitudes: np.ndarray) -> np.ndarray:
    """Logits [n, m] of ``images`` with ``latent`` forced to each of ``magnitudes`` [m] on all their tokens.

    ``logits`` [n] are those without an edit, of the features (so that the SAE's error stays) or of their decoding.
    Equal to encoding, setting, decoding and pooling, for the decoder and the classifier are linear.
    """
    before = images.amounts[:, [latent]].toarray().astype(np.float64)
    return logits[:, None] + effect * (images.room[:, None] * magnitudes - before)


def neutralised(
    logits: np.ndarray, images: Wholes, effects: np.ndarray, latents: np.ndarray, usual: np.ndarray
) -> np.ndarray:
    """Logits [n] with each of ``latents`` [m] at its ``usual`` amount [d_sae] in all images: it tells nothing apart."""
    change = images.amounts[:, latents] @ effects[latents]
    return logits - change + float(usual[latents] @ effects[latents])


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
    latent: int, effect: float, logits: np.ndarray, truth: np.ndarray, images: Wholes, examples: tuple[int, int],
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


def pushes(latents: np.ndarray, effects: np.ndarray, logits: np.ndarray, images: Wholes) -> np.ndarray:
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
