"""Concept arithmetic: images decoded with single latents turned up or down [MSAE §5.2, Fig. 7]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from sae_lightning.saes import SAE

SCALE_IMAGES = 64  # that tell the mean scale of an input norm


class Decoded:
    """Images decoded from their codes, in which latents can be turned again and again at little cost.

    ``features`` [n, P, d_in] raw. ``images`` [n, d_in] float32 are the means over tokens of what the SAE makes of
    them, ``error`` [n, d_in] what is missing. The decoder is linear, so that latent i at the magnitude α on all
    tokens adds (α s - z) · W_dec[i] times the normaliser's deviation, with z [n, d_sae] the mean of its codes and s
    [n] the mean of 1; both weighted by each token's own scale where the SAE norms its input by sample.
    """

    @torch.no_grad()
    def __init__(self, sae: SAE, features: Tensor) -> None:
        n, each, d_in = features.shape
        codes = sae.encode(features.float())
        self.sae = sae
        self.images = sae.decode(codes).view(n, each, d_in).mean(1)
        self.error = features.float().mean(1) - self.images
        scale = torch.ones(n * each) if codes.frame is None else codes.frame[1].flatten()
        self.scale = scale.view(n, each).mean(1)
        rows = codes.rows()
        weights = codes.values.float() * scale[rows] / each
        entries = (weights.numpy(), ((rows // each).numpy(), codes.latents.numpy()))
        self.codes = csr_matrix(entries, (n, sae.d_sae)).tocsc()  # sums the tokens of an image

    def change(self, latent: int, to: float) -> Tensor:
        """How far the images move along the latent's decoder row when it is turned to ``to``, [n], in raw units."""
        now = torch.from_numpy(self.codes[:, latent].toarray()[:, 0].astype(np.float32))
        return (to * self.scale - now) * self.sae.normalizer.std

    @torch.no_grad()
    def turned(self, latent: int, to: float, along: Tensor | None = None, keep_error: bool = False) -> Tensor:
        """The images [n, d_in] with ``latent`` at ``to`` on all tokens.

        ``along`` [d_in], of the length of the latent's decoder row, is a direction to go instead (a baseline).
        """
        row = self.sae.W_dec[latent] if along is None else along
        moved = self.images + self.change(latent, to)[:, None] * row
        return moved + self.error if keep_error else moved


def turned(sae: SAE, features: Tensor, latent: int, to: Sequence[float], keep_error: bool = False) -> Tensor:
    """Raw features of images [m, n, d_in] with ``latent`` at each of the m magnitudes ``to`` on all their tokens.

    ``features`` [n, P, d_in] raw; of patch tokens the result is their mean. ValueError for an unknown latent.
    """
    if not 0 <= latent < sae.d_sae:
        raise ValueError(f"There is no latent {latent}; this SAE has 0 to {sae.d_sae - 1}.")
    decoded = Decoded(sae, features)
    return torch.stack([decoded.turned(latent, value, keep_error=keep_error) for value in to])


def spread(sae: SAE, features: Tensor) -> float:
    """The magnitude that moves an image as far as images lie from their mean (root mean square).

    ``features`` [n, P, d_in] raw. Latents' own activations are no common measure: dictionaries with many active
    latents use small ones, and turning by multiples of these moves nothing.
    """
    pooled = features.float().mean(1)
    far = (pooled - pooled.mean(0)).square().sum(1).mean().sqrt()
    return float(far / (sae.normalizer.std * Decoded(sae, features[:SCALE_IMAGES]).scale.mean()))
