"""What is held against people's choices: MS score, MonoScore, and rivals that need labels or nothing."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sae_lightning.apps.codes import as_codes, top_images
from sae_lightning.apps.names import dominant
from sae_lightning.apps.opened import Opened
from sae_lightning.benchmark.similarity import Judge, Similarity
from sae_lightning.metrics import MonoScore, MSScore

SCORES = {"ms": "MS score", "monoscore": "MonoScore", "purity": "class purity (labels)", "constant": "a constant"}
BATCH = 4096  # images


def latent_scores(opened: Opened, split: str, judge: Similarity, n_images: int) -> pd.DataFrame:
    """One row a latent of a run: ``run``, ``latent``, ``images`` that it fires on, and the scores.

    ``ms`` [ms-score-vlm] by the features of ``judge``, ``monoscore`` by the run's own, both of the pooled codes of
    ``split`` (NaN where a latent has no score); ``purity``, the share of its activation on one class; ``constant``;
    ``top_purity``, the share of the commonest class among its ``n_images`` strongest images. StoreError or
    BackboneError where the judge's features cannot be had.
    """
    codes, images = opened.codes(split), opened.images(split)
    other = judge.open(opened.made["config"], split)
    _, purity, fires = dominant(codes, images.labels, len(images.class_names))
    top = top_images(codes, n_images)
    return pd.DataFrame({
        "run": opened.name, "latent": np.arange(codes.shape[1]), "images": fires,
        "ms": _scored(MSScore, opened, split, other), "monoscore": _scored(MonoScore, opened, split, None),
        "purity": purity, "constant": 1.0, "top_purity": [_commonest(images.labels[i[i >= 0]]) for i in top],
    })  # fmt: skip


def _scored(kind: type[MonoScore], opened: Opened, split: str, other: object) -> np.ndarray:
    store, codes = opened.store(split), opened.codes(split)
    judge = Judge(store, other)  # type: ignore[arg-type]
    metric = kind(codes.shape[1], judge.d)
    for start in range(0, codes.shape[0], BATCH):
        some = slice(start, min(start + BATCH, codes.shape[0]))
        metric.update(as_codes(codes[some]), judge.embeddings(some, store.features(some)))
    return np.where(metric.scored().numpy(), metric.scores().numpy(), np.nan)


def _commonest(labels: np.ndarray) -> float:
    return float(np.bincount(labels).max() / len(labels)) if len(labels) else np.nan
