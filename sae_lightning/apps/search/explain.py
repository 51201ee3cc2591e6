"""Which latents make two images near: what each shared latent adds to their nearness beyond the average image."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix, diags_array

from sae_lightning.apps.search.neighbours import WAYS


def contributions(queries: csr_matrix, found: csr_matrix, gallery: csr_matrix, by: str = "cosine") -> csr_matrix:
    """What each latent that both images of a pair activate adds to their nearness, [n, d_sae] float64.

    ``queries`` and ``found`` [n, d_sae] are the pairs, row by row, ``gallery`` [m, d_sae] the images searched. With
    x, y the codes of a pair and ⟨·⟩ the mean over the gallery's g: for "cosine" x_i (y_i/|y| - ⟨g_i/|g|⟩)/|x|, for
    "manhattan" ⟨|x_i - g_i|⟩ - |x_i - y_i|. Over all latents, shared or not, these sum to how much nearer the
    neighbour is than the average image, so that a latent which fires everywhere explains little.
    """
    if by not in WAYS:
        raise ValueError(f"Unknown distance '{by}'; choose {' or '.join(WAYS)}.")
    x, y, g = (csr_matrix(m, dtype=np.float64) for m in (queries, found, gallery))
    shared = csr_matrix(x.multiply(y))
    if not shared.nnz:
        return csr_matrix(x.shape)
    rows, latents = np.repeat(np.arange(x.shape[0]), np.diff(shared.indptr)), shared.indices
    a, b = (np.asarray(m[rows, latents]).ravel() for m in (x, y))
    if by == "cosine":
        mean = np.asarray(_unit(g).mean(0)).ravel()
        added = a / _lengths(x)[rows] * (b / _lengths(y)[rows] - mean[latents])
    else:
        added = _mean_gap(g, latents, a) - abs(a - b)
    return csr_matrix((added, latents, shared.indptr), x.shape)


def top_shared(explained: csr_matrix, n: int) -> list[list[tuple[int, float]]]:
    """For each pair up to ``n`` latents with their positive contributions, largest first."""
    lists = []
    for start, stop in zip(explained.indptr[:-1], explained.indptr[1:], strict=True):
        values, latents = explained.data[start:stop], explained.indices[start:stop]
        order = [i for i in np.argsort(-values, kind="stable")[:n] if values[i] > 0]
        lists.append([(int(latents[i]), float(values[i])) for i in order])
    return lists


def _lengths(x: csr_matrix) -> np.ndarray:
    lengths = np.sqrt(np.asarray(x.multiply(x).sum(1)).ravel())
    return np.where(lengths > 0, lengths, 1)


def _unit(x: csr_matrix) -> csr_matrix:
    return csr_matrix(diags_array(1 / _lengths(x)) @ x)


def _mean_gap(gallery: csr_matrix, latents: np.ndarray, values: np.ndarray) -> np.ndarray:
    """⟨|v - g_i|⟩ over the gallery for pairs of a latent i and its value v >= 0, through sorted columns."""
    columns, m = gallery.tocsc(), gallery.shape[0]
    gaps = np.zeros(len(values))
    order = np.argsort(latents, kind="stable")
    for here in np.split(order, np.flatnonzero(np.diff(latents[order])) + 1) if len(order) else []:
        latent = latents[here[0]]
        column = np.sort(columns.data[columns.indptr[latent] : columns.indptr[latent + 1]])
        sums = np.concatenate([[0.0], np.cumsum(column)])
        v, below = values[here], np.searchsorted(column, values[here])
        above = sums[-1] - sums[below] - (len(column) - below) * v
        gaps[here] = (v * (m - len(column)) + v * below - sums[below] + above) / m
    return gaps
