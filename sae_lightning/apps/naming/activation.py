"""Words by when latents fire: correlation of codes with how well each image fits each word, as CLIP-Dissect does."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csc_matrix, csr_matrix
from torch import Tensor

from sae_lightning.apps.naming.match import Score


class Fits(NamedTuple):
    """How well word v fits image i: ``images[i] · texts[v]``, of mean 0 and deviation 1 over the images.

    ``images`` [n, d], ``texts`` [V, d]; the n · V products are never held at once.
    """

    images: Tensor
    texts: Tensor


def fit(images: Tensor, texts: Tensor) -> Fits:
    """Cosines of image embeddings [n, d], centred at their mean, and placed texts [V, d], made scores over the images.

    A word that fits all images alike fits each by 0.
    """
    x = images.float() - images.float().mean(0)
    x = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
    x = x - x.mean(0)
    t = texts / texts.norm(dim=1, keepdim=True).clamp_min(1e-12)
    deviation = ((t @ (x.T @ x / len(x))) * t).sum(1, keepdim=True).clamp_min(0).sqrt()
    return Fits(x, torch.where(deviation > 1e-6, t / deviation, 0.0))


def correlations(codes: csr_matrix | csc_matrix, fits: Fits) -> Score:
    """Pearson correlation over images of codes [n, d_sae] and ``fits``.

    ρ = mean(z · f) / std(z), since f has mean 0 and deviation 1; 0 for a latent that never changes. zᵀ(x tᵀ) is
    computed as (zᵀx)tᵀ, so memory is O(d_sae · d) and the codes stay sparse. ValueError when images differ in number.
    """
    n = codes.shape[0]
    if n != len(fits.images):
        raise ValueError(f"Expected the codes of {len(fits.images)} images; got those of {n}.")
    z = codes.tocsc().astype(np.float64)
    mean, square = (np.asarray(each.mean(0)).ravel() for each in (z, z.multiply(z)))
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    scale = np.divide(1.0, n * deviation, out=np.zeros_like(deviation), where=deviation > 1e-8)
    together = torch.from_numpy((z.T @ fits.images.double().numpy()) * scale[:, None]).float()
    return lambda block: together[block] @ fits.texts.T
