"""Nearest images by the cosine of features or codes, or by the Manhattan distance of codes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy import sparse
from scipy.sparse import csr_matrix, diags_array
from sklearn.metrics.pairwise import manhattan_distances
from torch import Tensor

from sae_lightning.apps.statistics import mean_interval, turns
from sae_lightning.data import ImageData
from sae_lightning.data.decode import to_rgb
from sae_lightning.metrics.probes import Matrix, as_matrix
from sae_lightning.metrics.retrieval import nearest
from sae_lightning.registry import one_of
from sae_lightning.runs.run import Run

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
    one_of(by, WAYS, "distance")
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


@dataclass(frozen=True)
class Query:
    """A picture with its raw features [1, P, d_in] and pooled codes [1, d_sae].

    ``index`` is its place in the gallery, -1 for a picture of one's own, whose ``label`` is -1 too.
    """

    title: str
    image: Image.Image
    features: Tensor
    codes: csr_matrix
    index: int = -1
    label: int = -1

    @property
    def pooled(self) -> np.ndarray:
        """The mean of its tokens, [1, d_in] float32."""
        return self.features.float().mean(1).numpy()


def queries_of(
    opened: Run, split: str, wanted: str | int | Iterable[str | int] | None, shown: int = 4, seed: int = 42
) -> list[Query]:
    """The queries that ``wanted`` names: numbers or ids of images of ``split``, or picture files; one or several.

    None: ``shown`` images drawn by ``seed``, of different classes as far as there are. ValueError for a name that is
    none of these.
    """
    images = opened.images(split)
    if wanted is None:
        return [_of_data(opened, split, i) for i in drawn(images.labels, shown, seed)]
    several = [wanted] if isinstance(wanted, (str, int)) else list(wanted)
    return [_query(opened, split, images, one) for one in several]


def drawn(labels: np.ndarray, n: int, seed: int) -> list[int]:
    """``n`` images by ``seed``, one of each class before a second of any."""
    order = np.random.default_rng(seed).permutation(len(labels))
    return order[np.argsort(turns(labels[order]), kind="stable")[:n]].tolist()


def _query(opened: Run, split: str, images: ImageData, one: str | int) -> Query:
    if isinstance(one, str) and one in images.image_ids:
        return _of_data(opened, split, images.image_ids.index(one))
    if str(one).isdecimal() and int(one) < len(images):
        return _of_data(opened, split, int(one))
    path = Path(str(one)).expanduser()
    if not path.is_file():
        raise ValueError(
            f"app.queries={one} is neither a number below {len(images)} or an image id of the {split} split nor a "
            "picture file; give one of these."
        )
    image = to_rgb(path, str(one))
    features = opened.picture_features(image)
    return Query(path.name, image, features, opened.encode(features))


def _of_data(opened: Run, split: str, index: int) -> Query:
    images = opened.images(split)
    features = opened.store(split).features(torch.tensor([index])).float()
    label = int(images.labels[index])
    title = f"{images.class_names[label]} · {images.image_ids[index]}"
    return Query(title, images[index], features, opened.encode(features), index, label)


def contributions(queries: csr_matrix, found: csr_matrix, gallery: csr_matrix, by: str = "cosine") -> csr_matrix:
    """What each latent that both images of a pair activate adds to their nearness, [n, d_sae] float64.

    ``queries`` and ``found`` [n, d_sae] are the pairs, row by row, ``gallery`` [m, d_sae] the images searched. With
    x, y the codes of a pair and ⟨·⟩ the mean over the gallery's g: for "cosine" x_i (y_i/|y| - ⟨g_i/|g|⟩)/|x|, for
    "manhattan" ⟨|x_i - g_i|⟩ - |x_i - y_i|. Over all latents, shared or not, these sum to how much nearer the
    neighbour is than the average image, so that a latent which fires everywhere explains little.
    """
    one_of(by, WAYS, "distance")
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


KS = (1, 5, 10)

FEATURES, MANHATTAN, COSINE = "features, cosine", "codes, Manhattan", "codes, cosine"

CENTRED, PROJECTED, SHUFFLED = "features less their mean, cosine", "random projection, cosine", "shuffled codes, cosine"


def precision(found: np.ndarray, labels: np.ndarray, gallery_labels: np.ndarray, k: int) -> np.ndarray:
    """The share of the first ``k`` of ``found`` [n, >= k] with the query's label, [n]; a missing one (-1) has none."""
    found = found[:, :k]
    return ((gallery_labels[found] == labels[:, None]) & (found >= 0)).mean(1)


def spaces(features: np.ndarray, codes: csr_matrix, mean: np.ndarray, seed: int) -> dict[str, tuple[Matrix, str]]:
    """What is searched and by which distance: features, codes, and what shows that these are no accident.

    ``features`` [n, d_in], ``codes`` [n, d_sae], ``mean`` [d_in] of training features.
    """
    rng = np.random.default_rng(seed)
    projection = rng.standard_normal((features.shape[1], codes.shape[1])).astype(np.float32)
    return {
        FEATURES: (features, "cosine"),
        CENTRED: (features - mean, "cosine"),
        MANHATTAN: (codes, "manhattan"),
        COSINE: (codes, "cosine"),
        PROJECTED: (features @ projection, "cosine"),
        SHUFFLED: (shuffled(codes, rng), "cosine"),
    }


def shuffled(codes: csr_matrix, rng: np.random.Generator) -> csr_matrix:
    """The codes with each latent's values dealt out anew to as many images: same latents, no meaning."""
    columns = codes.tocsc(copy=True)
    for start, stop in zip(columns.indptr[:-1], columns.indptr[1:], strict=True):
        columns.indices[start:stop] = rng.choice(codes.shape[0], stop - start, replace=False)
    columns.has_sorted_indices = False
    return columns.tocsr()


def precisions(
    searched: dict[str, tuple[Matrix, str]], labels: np.ndarray, queries: np.ndarray, ks: Sequence[int] = KS
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Precision at each of ``ks`` of every space for the images ``queries`` [q] against all others.

    A table (method, k, precision, low, high, and ``gain`` over the features, with its own interval from the paired
    bootstrap) and the neighbours [q, max(ks)] of each method.
    """
    found = {
        name: neighbours(space[queries], space, max(ks), by, queries).images for name, (space, by) in searched.items()
    }
    rows = []
    for name, images in found.items():
        for k in ks:
            values = precision(images, labels[queries], labels, k)
            gain = values - precision(found[FEATURES], labels[queries], labels, k)
            (low, high), (gain_low, gain_high) = mean_interval(values), mean_interval(gain)
            rows.append({
                "method": name, "k": k, "precision": values.mean(), "low": low, "high": high,
                "gain": gain.mean(), "gain_low": gain_low, "gain_high": gain_high,
            })  # fmt: skip
    return pd.DataFrame(rows), found


def agreement_of_shared(
    codes: csr_matrix, found: np.ndarray, queries: np.ndarray, labels: np.ndarray, dominant: np.ndarray, by: str,
    n: int = 3, seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Whether the latents that explain a neighbour of the query's class are of that class, and whether any shared are.

    Of the pairs of ``queries`` [q] and those of their neighbours ``found`` [q, k] with the same label: the share of the
    top ``n`` shared latents whose ``dominant`` class [d_sae] is that label, and the share among as many shared latents
    drawn at random; both a mean over a query's pairs. Pairs and queries that share none are left out.
    """
    q, place = np.nonzero((labels[found] == labels[queries][:, None]) & (found >= 0))
    a, b = queries[q], found[q, place]
    explained = contributions(codes[a], codes[b], codes, by)
    rng = np.random.default_rng(seed)
    rows = []
    for pair, best in enumerate(top_shared(explained, n)):
        if best:
            shared = explained.indices[explained.indptr[pair] : explained.indptr[pair + 1]]
            dealt = rng.choice(shared, len(best), replace=False)
            own = labels[a[pair]]
            top = [latent for latent, _ in best]
            rows.append((q[pair], np.mean(dominant[top] == own), np.mean(dominant[dealt] == own)))
    means = pd.DataFrame(rows, columns=["query", "top", "random"]).groupby("query").mean()
    return means["top"].to_numpy(), means["random"].to_numpy()
