"""Nearest images by the cosine of features or codes, or by the Manhattan distance of codes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse
from sklearn.metrics.pairwise import manhattan_distances

from sae_lightning.benchmark.probes import Matrix, as_matrix
from sae_lightning.benchmark.retrieval import nearest

WAYS = ("cosine", "manhattan")
BLOCK = 1 << 24  # Manhattan distances held at once


class Found(NamedTuple):
    """The k nearest of n queries, nearest first: rows of the gallery ``images`` [n, k] int64 (-1: none) and their
    ``distances`` [n, k] float64 (NaN there): 1 - cosine, or the sum of absolute differences."""

    images: np.ndarray
    distances: np.ndarray


def neighbours(queries: Matrix, gallery: Matrix, k: int, by: str = "cosine", own: np.ndarray | None = None) -> Found:
    """The ``k`` rows of ``gallery`` [m, d] nearest to each of ``queries`` [n, d]; both dense, or both sparse.

    ``own`` [n] names the row that is the query itself and is left out, -1 for none. Of equal cosines the lower row
    comes first. A row of zeros has no cosine: it finds nothing and is not found. Sparse rows stay sparse: a product
    for cosines, a merge of two rows for Manhattan, some 2²⁴ distances at a time. ValueError for an unknown ``by``.
    """
    if by not in WAYS:
        raise ValueError(f"Unknown distance '{by}'; choose {' or '.join(WAYS)}.")
    own = np.full(queries.shape[0], -1) if own is None else np.asarray(own)
    search = nearest if by == "cosine" else _nearest_manhattan
    images = _without(search(queries, gallery, k + 1), own)[:, :k]
    return Found(images, _distances(as_matrix(queries), as_matrix(gallery), images, by))


def _without(found: np.ndarray, own: np.ndarray) -> np.ndarray:
    """``found`` [n, k] with each row's own number moved behind the others."""
    order = np.argsort(found == own[:, None], axis=1, kind="stable")
    mine = np.take_along_axis(found, order, axis=1)
    return np.where((mine == own[:, None]) & (own[:, None] >= 0), -1, mine)


def _nearest_manhattan(queries: Matrix, gallery: Matrix, k: int) -> np.ndarray:
    queries, gallery = _plain(queries), _plain(gallery)
    m = gallery.shape[0]
    found = np.full((queries.shape[0], k), -1, dtype=np.int64)
    step = max(1, BLOCK // max(1, m))
    for start in range(0, queries.shape[0], step):
        far = manhattan_distances(queries[start : start + step], gallery)
        some = np.sort(np.argpartition(far, min(k, m) - 1, axis=1)[:, :k], axis=1)
        order = np.argsort(np.take_along_axis(far, some, axis=1), axis=1, kind="stable")
        found[start : start + step, :m] = np.take_along_axis(some, order, axis=1)
    return found


def _plain(x: Matrix) -> np.ndarray | sparse.csr_matrix:
    """As scikit-learn takes it: sparse rows with 32-bit indices."""
    if not sparse.issparse(x):
        return as_matrix(x)
    rows = sparse.csr_matrix(x)
    return sparse.csr_matrix((rows.data, rows.indices.astype(np.int32), rows.indptr.astype(np.int32)), rows.shape)


def _distances(queries: np.ndarray, gallery: np.ndarray, images: np.ndarray, by: str) -> np.ndarray:
    far = np.full(images.shape, np.nan)
    n, place = np.nonzero(images >= 0)
    step = max(1, BLOCK // gallery.shape[1])
    for start in range(0, len(n), step):
        some = slice(start, start + step)
        a, b = queries[n[some]], gallery[images[n[some], place[some]]]
        far[n[some], place[some]] = abs(a - b).sum(1) if by == "manhattan" else 1 - _cosine(a, b)
    return far


def _cosine(a: np.ndarray | sparse.csr_array, b: np.ndarray | sparse.csr_array) -> np.ndarray:
    def dot(x: np.ndarray | sparse.csr_array, y: np.ndarray | sparse.csr_array) -> np.ndarray:
        return (x.multiply(y) if isinstance(x, sparse.csr_array) else x * y).sum(1, dtype=np.float64)

    return dot(a, b) / np.sqrt(dot(a, a) * dot(b, b))
