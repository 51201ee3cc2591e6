"""How often a search finds images of the query's class, against features, projections and shuffled codes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from sae_lightning.apps.intervals import mean_interval
from sae_lightning.apps.search.explain import contributions, top_shared
from sae_lightning.apps.search.neighbours import neighbours
from sae_lightning.benchmark.probes import Matrix

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
