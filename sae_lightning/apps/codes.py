"""Codes of whole images as SciPy and as the metrics hold them, and where each latent is strongest."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_matrix

from sae_lightning.saes import SparseCodes


def as_csr(codes: SparseCodes) -> csr_matrix:
    """Codes [n, d_sae] as SciPy holds them, float32."""
    rows = (codes.values.float().numpy(), codes.latents.numpy(), codes.offsets.numpy())
    return csr_matrix(rows, (codes.n_samples, codes.d_sae))


def as_codes(matrix: csr_matrix) -> SparseCodes:
    """``matrix`` [n, d_sae] as SparseCodes, float32, which metrics take."""
    rows = matrix.sorted_indices()
    latents, offsets = (torch.from_numpy(index.astype(np.int64)) for index in (rows.indices, rows.indptr))
    return SparseCodes(latents, torch.from_numpy(rows.data.astype(np.float32)), offsets, matrix.shape[1])


def top_images(codes: csr_matrix, n: int, latents: np.ndarray | None = None) -> np.ndarray:
    """The up to ``n`` images [m, n] int64 on which each of ``latents`` [m] (None: all) is strongest, strongest first.

    -1 where it fires on fewer; of equals the earlier image first.
    """
    by_latent = codes.tocsc()
    latents = np.arange(codes.shape[1]) if latents is None else latents
    found = np.full((len(latents), n), -1, dtype=np.int64)
    for row, latent in enumerate(latents.tolist()):
        span = slice(*by_latent.indptr[latent : latent + 2])
        values, images = by_latent.data[span], by_latent.indices[span]
        order = np.lexsort((images, -values))[:n]
        order = order[values[order] > 0]
        found[row, : len(order)] = images[order]
    return found
