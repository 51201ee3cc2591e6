"""Images from a latent's whole range of activation: its top, middle and bottom band [MonoLoss §4.1, App. C]."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lightning.benchmark.image_codes import ImageCodes

BANDS = ("top", "middle", "bottom")


def bands(codes: ImageCodes, latents: Tensor, n: int = 8) -> tuple[Tensor, Tensor]:
    """``images`` [m, 3, n] int64 and their activations [m, 3, n] float32 of ``latents`` [m]; -1 and 0 where none.

    All images on which a latent is positive are sorted by activation, descending, of equals the earlier first. The
    top band is the first n of them, the bottom band the last n, the middle band the n in the middle. Where fewer than
    3n fire, the sorted images are cut into thirds instead (a remainder goes to the upper ones), so that no image is
    shown twice.
    """
    entries = codes.of_latents(latents)
    images = torch.full((len(latents), len(BANDS), n), -1)
    values = torch.zeros(images.shape)
    for i in range(len(latents)):
        own = slice(int(entries.offsets[i]), int(entries.offsets[i + 1]))
        strength, order = entries.values[own].sort(descending=True, stable=True)
        for band, (start, stop) in enumerate(_spans(len(order), n)):
            images[i, band, : stop - start] = entries.images[own][order[start:stop]]
            values[i, band, : stop - start] = strength[start:stop]
    return images, values


def _spans(count: int, n: int) -> list[tuple[int, int]]:
    """Start and stop of the three bands among ``count`` sorted images."""
    if count >= 3 * n:
        middle = (count - n) // 2
        return [(0, n), (middle, middle + n), (count - n, count)]
    first, second = -(-count // 3), -(-(count - -(-count // 3)) // 2)
    return [(0, first), (first, first + second), (first + second, count)]


def ranked(monoscores: Tensor) -> Tensor:
    """Latents by MonoScore [d_sae], descending, of equals the lower latent first."""
    return monoscores.argsort(descending=True, stable=True)


def spread_ranks(d_sae: int, n: int, seed: int = 0) -> Tensor:
    """``n`` ranks (all if there are fewer), one drawn by ``seed`` from each of n equal parts of 0 … d_sae - 1.

    They depend on nothing but d_sae, so that the runs of a comparison show the same ranks.
    """
    edges = torch.linspace(0, d_sae, min(n, d_sae) + 1, dtype=torch.float64).long()
    draw = torch.rand(len(edges) - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return edges[:-1] + (draw * edges.diff()).long()
