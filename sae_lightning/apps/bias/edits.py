"""What forcing a latent to a magnitude does to features of whole images, and so to a linear classifier's logits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from sae_lightning.apps.codes import as_csr
from sae_lightning.saes import SAE
from sae_lightning.saes.codes import SparseCodes


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
