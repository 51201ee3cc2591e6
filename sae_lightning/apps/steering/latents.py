"""Which latents are turned, the random ones beside them, and the mean difference of a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from sae_lightning.apps.statistics import fires_alike, turns
from sae_lightning.evaluation.by_latent import top_images, top_purity


@dataclass(frozen=True)
class SteeredLatent:
    """A latent to turn: the class of most of its ``top`` images (strongest first) and that class's ``purity`` among
    them, its largest activation ``peak``, the ``images`` it fires on, and a ``random`` latent that fires as often."""

    latent: int
    label: int
    purity: float
    peak: float
    images: int
    top: tuple[int, ...]
    random: int


def choose(codes: csr_matrix, labels: np.ndarray, n: int, top: int, purity: float, seed: int) -> list[SteeredLatent]:
    """``n`` latents by purity: the purest of each class, then each class's second, and so on.

    ``codes`` [n_images, d_sae] are pooled to images, those of the train split. Only latents with ``top`` images or more
    and at least ``purity`` of these in one class count. ValueError when there is none.
    """
    images, fired, peaks = top_images(codes, top), codes.getnnz(0), codes.max(0).toarray()[0]
    label, share = (t.numpy() for t in top_purity(torch.from_numpy(images), torch.as_tensor(labels)))
    able = np.flatnonzero((fired >= top) & (share >= purity))
    if not len(able):
        raise ValueError(
            f"No latent has {top} images or more with {purity:.0%} of the strongest {top} in one class; lower "
            "app.purity or app.top, or train longer."
        )
    chosen = round_robin(able, label[able], share[able])[:n]
    controls = matched(fired, chosen, seed)
    return [
        SteeredLatent(
            j, int(label[j]), float(share[j]), float(peaks[j]), int(fired[j]), tuple(images[j].tolist()), other
        )
        for j, other in zip(chosen.tolist(), controls, strict=True)
    ]


def round_robin(latents: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """``latents`` [m] in turns over their classes ``labels`` [m]: all bests of a class by score, all seconds, ..."""
    order = np.lexsort((latents, -scores))
    return latents[order[np.argsort(turns(labels[order]), kind="stable")]]


def matched(fired: np.ndarray, latents: Sequence[int] | np.ndarray, seed: int) -> list[int]:
    """For each of ``latents`` another one, drawn from those nearest to it in the number of images it fires on.

    ``fired`` [d_sae] counts images. ValueError where no other latent fires.
    """
    rng, every = np.random.default_rng(seed), np.arange(len(fired))
    drawn = [fires_alike(int(latent), every != latent, fired, rng) for latent in latents]
    if -1 in drawn:
        raise ValueError("No latent but one ever fires; there is none to compare with. Train longer.")
    return drawn


def diffmean(features: np.ndarray, present: np.ndarray) -> Tensor:
    """Mean token of the images where a concept is ``present`` ([n] bool) minus that of the others, [d_in] float32.

    ``features`` [n, d_in] are each image's mean token. ValueError when either kind is missing.
    """
    if present.all() or not present.any():
        raise ValueError("DiffMean needs images with the concept and images without it; all are of one kind.")
    means = [features[rows].mean(0, dtype=np.float64) for rows in (present, ~present)]
    return torch.from_numpy((means[0] - means[1]).astype(np.float32))
