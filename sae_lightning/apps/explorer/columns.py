"""What is known of every latent of a run, as columns to sort by: from its evaluation, and from its codes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from sae_lightning.apps.codes import as_codes
from sae_lightning.benchmark.evaluate import stored_scores
from sae_lightning.benchmark.latents import LATENTS, read_tensors
from sae_lightning.benchmark.top_images import top_purity
from sae_lightning.metrics import MonoScore, Purity
from sae_lightning.saes import SparseCodes

TOP = 9  # images whose purity is ``top_purity``, as in the report
TITLES = {
    "monoscore": ("MonoScore", "How alike the pictures are that it fires on, weighted by how strongly."),
    "purity": ("Purity", "Share of its most frequent class among the pictures it fires on."),
    "weighted_purity": ("Weighted purity", "Share of its most frequent class in the sum of its activations."),
    "top_purity": ("Top-9 purity", "Share of one class among its nine strongest pictures."),
    "moran": ("Moran's I", "How much neighbouring patches activate it together; 0 is chance."),
    "image_share": ("Pictures", "Share of all pictures on which it fires."),
    "token_share": ("Patches", "Share of all patches on which it fires."),
    "peak": ("Peak", "Its largest activation."),
    "monosemanticity": ("Monosemanticity", "How alike its strongest pictures are, beyond random ones."),
    "monosemanticity_within_mass": ("Pairs of one class", "Share of pairs of one class among its strongest pictures."),
}
NOT_SHOWN = ("scored", "counts", "images_fired", "moran_images", "dominant_class")  # used, or counts behind a figure


@dataclass(frozen=True)
class Column:
    """One figure of every latent: ``values`` [d_sae] float64, NaN where a latent has none."""

    name: str
    title: str
    about: str
    values: np.ndarray


@dataclass(frozen=True)
class Known:
    """All columns by name; ``label`` [d_sae] int64 is the most frequent class (-1: never fires), ``images_fired``
    [d_sae] int64 counts pictures; ``evaluated`` says whether figures of an evaluation are among the columns.
    """

    columns: dict[str, Column]
    label: np.ndarray
    images_fired: np.ndarray
    evaluated: bool


def known(
    codes: csr_matrix, top: Tensor, labels: Tensor, n_classes: int, embeddings: np.ndarray,
    evaluation: Mapping[str, Tensor] | None = None, n_tokens: int = 0,
) -> Known:  # fmt: skip
    """Columns of latents from the ``codes`` [n, d_sae] of images and what an ``evaluation`` found, which comes first.

    ``top`` [d_sae, m ≥ 9] are each latent's strongest images (-1: none), ``labels`` [n] indices of ``n_classes``,
    ``embeddings`` [n, d] judge how alike images are where no evaluation has, ``n_tokens`` are those of its counts.
    """
    sparse = as_codes(codes)
    purity = Purity(sparse.d_sae, n_classes)
    purity.update(sparse, labels)
    found = purity.per_latent()
    fired, never = found.images.numpy(), (found.images == 0).numpy()
    peak = np.zeros(sparse.d_sae)
    np.maximum.at(peak, codes.indices, codes.data)
    figures = {
        "monoscore": None if evaluation else monoscore(sparse, embeddings),
        "purity": found.purity.numpy(), "weighted_purity": found.weighted_purity.numpy(),
        "top_purity": top_purity(top[:, :TOP], labels)[1].numpy(), "image_share": fired / codes.shape[0], "peak": peak,
    }  # fmt: skip
    if n_classes < 2:
        figures = {name: values for name, values in figures.items() if "purity" not in name}
    for name in ("purity", "weighted_purity", "top_purity", "peak"):
        if name in figures:
            figures[name] = np.where(never, np.nan, figures[name])
    figures |= {} if evaluation is None else of_evaluation(evaluation, n_tokens, never, n_classes)
    ordered = [*(n for n in TITLES if n in figures), *sorted(n for n in figures if n not in TITLES)]
    columns = {name: _column(name, np.asarray(figures[name], dtype=np.float64)) for name in ordered}
    return Known(columns, found.dominant.numpy(), fired, evaluation is not None)


def of_evaluation(
    tensors: Mapping[str, Tensor], n_tokens: int, never: np.ndarray, n_classes: int
) -> dict[str, np.ndarray]:
    """The figures among ``tensors``: all of [d_sae]; NaN for latents without a MonoScore or that ``never`` fire."""
    figures = {
        name: tensor.double().numpy().copy() for name, tensor in tensors.items()
        if tensor.shape == never.shape and name not in NOT_SHOWN and (n_classes > 1 or "purity" not in name)
    }  # fmt: skip
    for values in figures.values():
        values[never] = np.nan
    if "scored" in tensors and "monoscore" in figures:
        figures["monoscore"][~tensors["scored"].bool().numpy()] = np.nan
    if "counts" in tensors and n_tokens:
        figures["token_share"] = tensors["counts"].double().numpy() / n_tokens
    return figures


def monoscore(codes: SparseCodes, embeddings: np.ndarray) -> np.ndarray:
    """The MonoScore [d_sae] of each latent by the cosine of ``embeddings`` [n, d]; NaN where there is none."""
    metric = MonoScore(codes.d_sae, embeddings.shape[1])
    metric.update(codes, torch.as_tensor(embeddings).float())
    return torch.where(metric.scored(), metric.scores(), torch.nan).numpy()


def evaluation_of(run: Path, split: str) -> tuple[dict[str, Tensor], int] | None:
    """What evaluate.py found of single latents of ``run`` on ``split``, and the tokens behind its counts; None without.

    One that is older than the SAE or of another split is none.
    """
    scores = stored_scores(run, split, ())
    return None if scores is None else (read_tensors(run / LATENTS)[0], int(scores["n_tokens"]))


def percentiles(columns: Iterable[Column]) -> dict[str, np.ndarray]:
    """By column the share [d_sae] of latents with a figure that lie below each latent's, from 0 to 1; NaN without."""
    shares = {}
    for column in columns:
        has = ~np.isnan(column.values)
        values = column.values[has]
        share = np.full(len(column.values), np.nan)
        share[has] = np.searchsorted(np.sort(values), values) / max(1, len(values) - 1)
        shares[column.name] = share
    return shares


def _column(name: str, values: np.ndarray) -> Column:
    title, about = TITLES.get(name, (name.replace("_", " ").capitalize(), "From the evaluation."))
    return Column(name, title, about, values)
