"""Retrieval by cosine: images by an image of their class, and images and their texts by each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from sae_lightning.metrics import probes
from sae_lightning.metrics.base import Score
from sae_lightning.metrics.intervals import averaged
from sae_lightning.metrics.part import INPUTS, Column, Options, Part, ScoredRun, Task, register
from sae_lightning.metrics.probes import Matrix

BLOCK = 1 << 25  # similarities held at once

Recall = dict[int, np.ndarray]  # which queries have a hit among their k nearest, [N] bool by k


def nearest(queries: Matrix, gallery: Matrix | None = None, k: int = 5, device: str = "cpu") -> np.ndarray:
    """Rows of the ``gallery`` [M, d] with the largest cosine to each of ``queries`` [N, d], best first: [N, k] int64.

    Without a gallery, each query is compared with all other queries. Of equal cosines the lower row comes first. A row
    of zeros has no cosine: it finds nothing and is not found. -1 where fewer than ``k`` rows can be found. Dense, or
    CSR, whose products are sparse on the CPU; similarities are in float32, some 2²⁵ of them at once. ValueError for
    rows of different widths or values that are not finite.
    """
    alone = gallery is None
    queries, has_direction = _unit(queries)
    gallery, in_gallery = (queries, has_direction) if gallery is None else _unit(gallery)
    (n, d), (m, width) = queries.shape, gallery.shape
    if d != width:
        raise ValueError(f"Queries have {d} dimensions, the gallery {width}; give both in one space.")
    found = np.full((n, k), -1, dtype=np.int64)
    similarity, hidden = _similarity(queries, gallery, device), torch.from_numpy(~in_gallery).to(device)
    step = max(1, BLOCK // max(1, m))
    for start in range(0, n, step):
        cosines = similarity(slice(start, start + step)).masked_fill_(hidden, -torch.inf)
        if alone:
            cosines.diagonal(start).fill_(-torch.inf)
        found[start : start + step, :m] = _largest(cosines, min(k, m)).cpu().numpy()
    found[~has_direction] = -1
    return found


def _unit(x: Matrix) -> tuple[np.ndarray | sparse.csr_array, np.ndarray]:
    """Rows of ``x`` in float32 at length 1 (those of zeros as they are), and which are not zero."""
    x = probes.as_matrix(x)
    exact = x.astype(np.float64)
    norm = np.sqrt((sparse.csr_array(exact).power(2) if sparse.issparse(x) else exact**2).sum(1))
    if not np.isfinite(norm).all():
        raise ValueError(f"Row {int(np.argmin(np.isfinite(norm)))} holds values that are not finite: it has no cosine.")
    scale = 1 / np.where(norm > 0, norm, 1)
    unit = sparse.csr_array(sparse.diags_array(scale) @ x) if sparse.issparse(x) else x * scale[:, None]
    return unit.astype(np.float32), norm > 0


def _similarity(
    queries: np.ndarray | sparse.csr_array, gallery: np.ndarray | sparse.csr_array, device: str
) -> Callable[[slice], Tensor]:
    """Products of some of the queries with all rows of the gallery, on ``device``."""
    if sparse.issparse(queries) and sparse.issparse(gallery) and torch.device(device).type == "cpu":
        columns = sparse.csr_array(gallery.T)
        return lambda rows: torch.from_numpy((queries[rows] @ columns).toarray())
    kept = probes.to_tensor(gallery, device)

    def dense(rows: slice) -> Tensor:
        block = queries[rows]
        block = sparse.csr_array(block).toarray() if sparse.issparse(block) else block
        return (kept @ probes.to_tensor(block, device).T).T.contiguous()

    return dense


def _largest(values: Tensor, k: int) -> Tensor:
    """Columns of the ``k`` largest of each row, largest first, of equals the lower; -1 for -inf."""
    top, columns = values.topk(k, dim=1)
    last, within = top[:, -1:], (top == top[:, -1:]).sum(1, keepdim=True)
    tied = ((values == last).sum(1, keepdim=True) > within).nonzero()[:, 0]  # more than there is room for
    if len(tied):
        rows, last = values[tied], last[tied]
        first = (rows == last) & ((rows == last).cumsum(1) <= within[tied])
        columns[tied] = ((rows > last) | first).nonzero()[:, 1].reshape(-1, k)
    columns = columns.sort(dim=1).values
    ordered = values.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return columns.gather(1, ordered.indices).masked_fill(ordered.values == -torch.inf, -1)


def recall(found: np.ndarray, query_ids: np.ndarray, gallery_ids: np.ndarray, ks: Sequence[int]) -> Recall:
    """Which queries have a row of their own id among the first k of ``found`` [N, K], for each of ``ks``."""
    hits = (gallery_ids[found] == query_ids[:, None]) & (found >= 0)
    return {k: hits[:, :k].any(1) for k in ks}


def image_recall(
    features: Matrix, labels: np.ndarray | Tensor, gallery: Matrix | None = None,
    gallery_labels: np.ndarray | Tensor | None = None, ks: Sequence[int] = (1, 5), device: str = "cpu",
) -> Recall:  # fmt: skip
    """Which images have one of their class among the k nearest [ViSAEBench §4.5, H3].

    ``features`` [N, d] and ``labels`` [N] are queried against the ``gallery``, by default each image against all
    others. Queries of a class that the gallery lacks cannot hit and are left out.
    """
    labels = probes.as_labels(labels)
    probes.check_rows(labels, features=features)
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("A gallery needs labels of its own, and labels a gallery; give both or neither.")
    of_gallery = labels if gallery_labels is None else probes.as_labels(gallery_labels)
    if gallery is not None:
        probes.check_rows(of_gallery, gallery=gallery)
    classes, counts = np.unique(of_gallery, return_counts=True)
    possible = np.isin(labels, classes[counts > (gallery is None)])
    found = nearest(features, gallery, max(ks), device)
    return recall(found[possible], labels[possible], of_gallery, ks)


class TextRecall(NamedTuple):
    """R@k of finding an image's text and a text's image."""

    image_to_text: Recall
    text_to_image: Recall


def text_recall(
    images: Matrix, texts: Matrix, same: np.ndarray | Tensor | None = None, ks: Sequence[int] = (1, 5),
    device: str = "cpu",
) -> TextRecall:  # fmt: skip
    """R@k of ``images`` [N, d] and their ``texts`` [N, d], paired by position, in both directions.

    Pairs with equal ids in ``same`` [N] have the same text, which then counts once, in its first position: as one row
    to be found, and as one query, for which each of its images is a hit. By default all texts differ.
    """
    ids = np.arange(images.shape[0]) if same is None else probes.as_labels(same)
    probes.check_rows(ids, images=images, texts=texts)
    first = np.sort(np.unique(ids, return_index=True)[1])
    distinct = probes.as_matrix(texts)[first]
    return TextRecall(
        recall(nearest(images, distinct, max(ks), device), ids, ids[first], ks),
        recall(nearest(distinct, images, max(ks), device), ids[first], ids, ks),
    )


def recalls(metric: str, unit: str, raw: Recall, reconstruction: Recall, codes: Recall) -> list[Score]:
    """R@k of all, and ``metric_lift`` = codes / raw [ViSAEBench App. O], at each k, over queries of a ``unit``."""
    given = {"raw": raw, "reconstruction": reconstruction, "codes": codes}
    return [
        *(averaged(f"{metric}_{name}", given[name][k], f"k={k}", unit=unit) for name in given for k in given[name]),
        *(averaged(f"{metric}_lift", codes[k], f"k={k}", raw[k], unit, len(raw[k])) for k in codes),
    ]


def retrieval(run: ScoredRun, options: Options) -> list[Score]:
    """R@k of finding an image of the same class, by raw features, reconstruction and codes."""
    images, at = run.images(), options["at"]

    def found(features: Matrix) -> Recall:
        return image_recall(features, images.labels, ks=at, device=run.device)

    raw = run.shared(f"retrieval {at}", lambda: found(images.raw))
    return recalls("retrieval", "pictures", raw, found(images.reconstruction), found(images.codes))


def image_text(run: ScoredRun, options: Options) -> list[Score]:
    """R@k between images and their captions: of embeddings, their reconstructions and the codes of both."""
    images, texts, at = run.images(), run.texts(), options["at"]
    scores = [Score("image_text_pairs", 0 if texts is None else len(texts.labels))]
    if texts is None:
        return scores
    raw, rebuilt, codes = (
        text_recall(getattr(images, kind), getattr(texts, kind), texts.labels, at, run.device)._asdict()
        for kind in INPUTS
    )
    for direction in raw:
        unit = direction.partition("_")[0].replace("image", "picture") + "s"
        scores += recalls(direction, unit, raw[direction], rebuilt[direction], codes[direction])
    return scores


def _columns(metric: str, title: str) -> tuple[Column, ...]:
    over = f"{title}, R@{{k}}"
    each = (Column(given, f"{metric}_{given}", "k={k}", form=".1%", over=over) for given in INPUTS)
    return (*each, Column("codes / raw", f"{metric}_lift", "k={k}", better=True, over=over))


DOWNSTREAM = "Downstream tasks"
ABOUT = "What raw features, reconstructions and codes are good for."
PART = register(Part(
    "retrieval", retrieval, needs=("images", "labels"), title=DOWNSTREAM, about=ABOUT,
    undefined="no two images are of one class, or raw features never find one",
    columns=_columns("retrieval", "image retrieval"), tasks=(Task("retrieval/{input}", "retrieval_{input}", "k=1"),),
))  # fmt: skip
TEXTS = register(Part(
    "image_text", image_text, needs=("images",), applies=lambda config: config.features == "embedding",
    title=DOWNSTREAM, about=ABOUT,
    columns=(*_columns("image_to_text", "text of an image"), *_columns("text_to_image", "image of a text")),
))  # fmt: skip
