"""Whole images in which single latents are forced to a value: as the decoder and means over tokens are linear, what
such an edit does to an image or to a linear classifier of it follows without encoding and decoding again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from sae_lightning.saes import SAE
from sae_lightning.saes.codes import SparseCodes


class WholeImages(NamedTuple):
    """n whole images: of patch tokens means over an image's tokens t, of other features the one vector.

    ``features`` and ``decoded`` [n, d_in] float64 are the encoder's and the SAE's reconstruction. ``magnitudes``
    [n, d_sae] are the codes pooled by maximum. ``amounts`` [n, d_sae] are means of code_t · scale_t and ``room`` [n] of
    scale_t, the scale that an input norm took from the token (1 without one).
    """

    features: np.ndarray
    decoded: np.ndarray
    magnitudes: csr_matrix
    amounts: csr_matrix
    room: np.ndarray

    def take(self, rows: np.ndarray) -> WholeImages:
        """The images ``rows`` (positions or a mask)."""
        return WholeImages(*(each[rows] for each in self))

    def where(self, mask: np.ndarray, other: WholeImages) -> WholeImages:
        """These images, but where ``mask`` [n] does not hold ``other``'s."""
        return _stacked([self, other]).take(np.arange(len(mask)) + np.where(mask, 0, len(mask)))

    def change(self, latent: int, magnitudes: np.ndarray) -> np.ndarray:
        """By how much [n, m] ``latent`` rises when it is forced to each of ``magnitudes`` [m] on all tokens.

        Times std · W_dec[latent] that is what is added to the image.
        """
        return np.outer(self.room, magnitudes) - self.amounts[:, [latent]].toarray().astype(np.float64)


def _stacked(parts: list[WholeImages]) -> WholeImages:
    """The images of all ``parts``, one after another."""
    return WholeImages(*(
        vstack(each, format="csr") if isinstance(each[0], csr_matrix) else np.concatenate(each)
        for each in zip(*parts, strict=True)
    ))  # fmt: skip


@torch.no_grad()
def whole_images(sae: SAE, batches: Iterable[Tensor]) -> WholeImages:
    """Encode and decode ``batches`` of raw features [b, P, d_in], P tokens an image; ValueError without any."""
    parts: list[WholeImages] = []
    for batch in batches:
        images, tokens = batch.shape[:2]
        codes = sae.encode(batch.float())
        lists = SparseCodes(codes.latents, codes.values, codes.offsets, codes.d_sae)
        scale = torch.ones(images * tokens, 1) if codes.frame is None else codes.frame[1]
        scaled = SparseCodes(codes.latents, codes.values * scale[codes.rows(), 0], codes.offsets, codes.d_sae)
        parts.append(WholeImages(
            batch.double().mean(1).numpy(), sae.decode(codes).double().reshape(batch.shape).mean(1).numpy(),
            lists.pool(tokens).csr(), scaled.pool(tokens, "mean").csr(),
            scale.double().reshape(images, tokens).mean(1).numpy(),
        ))  # fmt: skip
    if not parts:
        raise ValueError("There are no images to encode; widen the task's classes or the split.")
    return _stacked(parts)


def edited(
    sae: SAE, images: WholeImages, latent: int, to: Iterable[float], along: np.ndarray | None = None,
    keep_error: bool = False,
) -> np.ndarray:  # fmt: skip
    """``images`` [m, n, d_in] decoded with ``latent`` at each of the m magnitudes ``to`` on all tokens, float32.

    ``along`` [d_in], of the length of the latent's decoder row, is a direction to go instead (a baseline);
    ``keep_error`` adds what the SAE did not reconstruct. ValueError for an unknown latent.
    """
    if not 0 <= latent < sae.d_sae:
        raise ValueError(f"There is no latent {latent}; this SAE has 0 to {sae.d_sae - 1}.")
    row = sae.W_dec[latent].detach().double().numpy() if along is None else along
    change = images.change(latent, np.asarray(list(to), dtype=np.float64)) * float(sae.normalizer.std)
    start = images.features if keep_error else images.decoded
    return (start + change.T[..., None] * row).astype(np.float32)


def forced(logits: np.ndarray, images: WholeImages, effect: float, latent: int, magnitudes: np.ndarray) -> np.ndarray:
    """Logits [n, m] of ``images`` with ``latent`` forced to each of ``magnitudes`` [m] on all their tokens.

    ``logits`` [n] are those without an edit, of the features (so that the SAE's error stays) or of their decoding;
    ``effect`` is that of one unit of the latent.
    """
    return logits[:, None] + effect * images.change(latent, magnitudes)


def neutralised(
    logits: np.ndarray, images: WholeImages, effects: np.ndarray, latents: np.ndarray, usual: np.ndarray
) -> np.ndarray:
    """Logits [n] with each of ``latents`` [m] at its ``usual`` amount [d_sae] in all images: it tells nothing apart."""
    change = images.amounts[:, latents] @ effects[latents]
    return logits - change + float(usual[latents] @ effects[latents])
