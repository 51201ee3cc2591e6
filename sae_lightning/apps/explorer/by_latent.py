"""Codes of images read by latent: on which images each fires, strongest first."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from sae_lightning.evaluation import by_latent as by_band
from sae_lightning.evaluation.image_codes import ImageCodes, LatentEntries


class ByLatent:
    """The ``codes`` [n, d_sae] of images, by latent."""

    def __init__(self, codes: csr_matrix) -> None:
        columns = codes.tocsc()
        self.d_sae = codes.shape[1]
        self.offsets = columns.indptr.astype(np.int64)
        owner = np.repeat(np.arange(self.d_sae), np.diff(self.offsets))
        order = np.lexsort((columns.indices, -columns.data, owner))
        self.images, self.values = columns.indices[order].astype(np.int64), columns.data[order]

    def of_latents(self, latents: Tensor) -> LatentEntries:
        """All images on which ``latents`` [m] fire, with the values there, strongest first."""
        spans = [slice(self.offsets[i], self.offsets[i + 1]) for i in latents.tolist()]
        offsets = np.cumsum([0, *(s.stop - s.start for s in spans)])
        images = np.concatenate([np.empty(0, np.int64), *(self.images[s] for s in spans)])
        values = np.concatenate([np.empty(0, np.float32), *(self.values[s] for s in spans)])
        return LatentEntries(
            torch.from_numpy(images), torch.from_numpy(values.astype(np.float32)), torch.from_numpy(offsets)
        )

    def top(self, n: int) -> Tensor:
        """The ``n`` strongest images [d_sae, n] int64 of every latent; -1 where it fires on fewer."""
        counts = np.diff(self.offsets)
        place = np.arange(n)
        index = np.minimum(self.offsets[:-1, None] + place, max(0, len(self.images) - 1))
        images = self.images[index] if len(self.images) else np.full(index.shape, -1)
        return torch.from_numpy(np.where(place < counts[:, None], images, -1))

    def bands(self, latent: int, n: int) -> list[tuple[str, list[tuple[int, float]]]]:
        """Its top, middle and bottom ``n`` images with their activations; bands without any are left out."""
        images, values = by_band.bands(cast(ImageCodes, self), torch.tensor([latent]), n)
        rows = zip(by_band.BANDS, images[0].tolist(), values[0].tolist(), strict=True)
        found = [(name, [(i, v) for i, v in zip(own, strength, strict=True) if i >= 0]) for name, own, strength in rows]
        return [(name, shown) for name, shown in found if shown]

    def histogram(self, latent: int, bins: int = 24) -> list[int]:
        """How many images fall into each of ``bins`` equal parts of 0 … its peak; only images on which it fires."""
        own = self.values[self.offsets[latent] : self.offsets[latent + 1]]
        return np.histogram(own, bins=bins, range=(0, float(own.max())))[0].tolist() if len(own) else [0] * bins
